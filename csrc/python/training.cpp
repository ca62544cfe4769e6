#include "training.h"

#include "../cpu/lora_linear.h"
#include "calls.h"

namespace lora_kernels {

PyObject* training_down(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 4;
  if (!takes("lora_down", count, kArguments + 1)) return nullptr;
  return unless_watched(Py_None, [&] {
    View x = view_of_input(args[0]), A = view_of(args[1]);
    OptionalView seed = optional_view_of(args[2]);
    double p = number(args[3]);
    Ref made = call_last(args, kArguments);
    View v = view_of(made);
    {
      WithoutGIL unlocked;
      lora_down(x, A, seed, p, v);
    }
    return made.release();
  });
}

PyObject* training_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 11;
  if (!takes("lora_forward_", count, kArguments + 1)) return nullptr;
  return unless_watched(Py_None, [&] {
    View y = view_of_input(args[0]), x = view_of_input(args[1]), A = view_of(args[2]), B = view_of(args[3]);
    OptionalView column_scale = optional_view_of(args[4]), other = optional_view_of(args[5]);
    OptionalView other_scale = optional_view_of(args[6]), bias = optional_view_of(args[7]);
    OptionalView seed = optional_view_of(args[8]);
    double p = number(args[9]), scale = number(args[10]);
    Ref made = call_last(args, kArguments);
    View v = view_of(made);
    {
      WithoutGIL unlocked;
      lora_forward(y, x, A, B, column_scale, other, other_scale, bias, seed, p, scale, v);
    }
    return made.release();
  });
}

PyObject* training_out_grads(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 9;
  if (!takes("lora_out_grads", count, kArguments + 1)) return nullptr;
  return unless_watched(Py_None, [&] {
    View dy = view_of_input(args[0]), v = view_of(args[1]), B = view_of(args[2]);
    OptionalView y = optional_view_of(args[3]), bias = optional_view_of(args[4]);
    OptionalView column_scale = optional_view_of(args[5]);
    double scale = number(args[6]);
    bool need_v = truth(args[7]), need_B = truth(args[8]);
    Ref made = call_last(args, kArguments);
    Sequence results(made);
    if (results.views.size() != 4) throw NeedsDispatcher();
    {
      WithoutGIL unlocked;
      lora_out_grads(dy, v, B, y, bias, column_scale, scale, need_v, need_B, results.views[0], results.views[1],
                     results.views[2], results.views[3]);
    }
    return made.release();
  });
}

PyObject* training_in_grads(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 7;
  if (!takes("lora_in_grads_", count, kArguments + 1)) return nullptr;
  return unless_watched(Py_None, [&] {
    View dx = view_of_input(args[0]), dv = view_of(args[1]);
    OptionalView x = args[2] == Py_None ? OptionalView() : OptionalView(view_of_input(args[2]));
    View A = view_of(args[3]);
    OptionalView seed = optional_view_of(args[4]);
    double p = number(args[5]), scale = number(args[6]);
    Ref made = call_last(args, kArguments);
    View dA = view_of(made);
    {
      WithoutGIL unlocked;
      lora_in_grads(dx, dv, x, A, seed, p, scale, dA);
    }
    return made.release();
  });
}

PyObject* training_grads(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 10;
  if (!takes("lora_linear_grads", count, kArguments + 1)) return nullptr;
  return unless_watched(Py_None, [&] {
    View dx = view_of_input(args[0]), dy = view_of_input(args[1]), v = view_of(args[2]);
    OptionalView x = args[3] == Py_None ? OptionalView() : OptionalView(view_of_input(args[3]));
    View A = view_of(args[4]), B = view_of(args[5]);
    OptionalView seed = optional_view_of(args[6]);
    double p = number(args[7]), scale = number(args[8]);
    Ref made = call_last(args, kArguments);
    Sequence results(made);
    if (results.views.size() != 2) throw NeedsDispatcher();
    {
      WithoutGIL unlocked;
      lora_linear_grads(dx, dy, v, x, A, B, seed, p, scale, results.views[0], results.views[1]);
    }
    return made.release();
  });
}

PyObject* training_weight_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 5;
  if (!takes("lora_weight_norm", count, kArguments + 1)) return nullptr;
  return unless_watched(Py_None, [&] {
    View weight = view_of_input(args[0]), A = view_of(args[1]), B = view_of(args[2]), given = view_of(args[3]);
    double scale = number(args[4]);
    Ref made = call_last(args, kArguments);
    View norms = view_of(made);
    {
      WithoutGIL unlocked;
      lora_weight_norm(weight, A, B, given, scale, norms);
    }
    return made.release();
  });
}

PyObject* training_dropout(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 3;
  if (!takes("lora_dropout", count, kArguments + 1)) return nullptr;
  return unless_watched(Py_None, [&] {
    View x = view_of_input(args[0]), seed = view_of(args[1]);
    double p = number(args[2]);
    Ref made = call_last(args, kArguments);
    View out = view_of(made);
    {
      WithoutGIL unlocked;
      lora_dropout(x, seed, p, out);
    }
    return made.release();
  });
}

}  // namespace lora_kernels
