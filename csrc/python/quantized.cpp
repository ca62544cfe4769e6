#include "quantized.h"

#include "../cpu/quantized_linear.h"
#include "calls.h"
#include "linear.h"

namespace lora_kernels {

namespace {

// The first five arguments of what is done with a packed weight.
struct PackedArguments {
  View codes, scales;
  OptionalView offsets, table;
  int64_t group;

  explicit PackedArguments(PyObject* const* args)
      : codes(view_of(args[0])),
        scales(view_of(args[1])),
        offsets(optional_view_of(args[2])),
        table(optional_view_of(args[3])),
        group(int64_t(number(args[4]))) {}
};

}  // namespace

PyObject* quantized_linear_op(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 16;
  if (!takes("quantized_linear", count, kArguments + 1)) return nullptr;
  return unless_watched(Py_None, [&] {
    View x = view_of_input(args[0]);
    PackedArguments w(args + 1);
    OptionalView bias = optional_view_of(args[6]), v = optional_view_of(args[7]);
    Sequence B(args[8]);
    OptionalView ids = optional_view_of(args[9]), indptr = optional_view_of(args[10]);
    OptionalView plan = optional_view_of(args[11]), scaling = optional_view_of(args[12]);
    OptionalView ranks = optional_view_of(args[13]), weights = optional_view_of(args[14]);
    double scale = number(args[15]);
    if (quantized_prefers_panels(x, w.codes, w.scales, w.offsets, w.table, w.group)) throw NeedsDispatcher();
    Ref made = call_last(args, kArguments);
    View y = view_of(made);
    {
      WithoutGIL unlocked;
      quantized_linear(y, x, w.codes, w.scales, w.offsets, w.table, w.group, bias, v, {nullptr, 0}, B, ids, indptr,
                       plan, scaling, ranks, weights, scale);
    }
    return made.release();
  });
}

PyObject* quantized_linear_grad_op(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kArguments = 10;
  if (!takes("quantized_linear_grad", count, kArguments + 1)) return nullptr;
  return unless_watched(Py_None, [&] {
    View dy = view_of_input(args[0]);
    PackedArguments w(args + 1);
    int64_t in_features = int64_t(number(args[6]));
    OptionalView v = optional_view_of(args[7]), A = optional_view_of(args[8]);
    double scale = number(args[9]);
    if (quantized_grad_prefers_panels(dy, w.codes, w.scales, w.offsets, w.table, w.group, in_features))
      throw NeedsDispatcher();
    Ref made = call_last(args, kArguments);
    View dx = view_of(made);
    {
      WithoutGIL unlocked;
      quantized_linear_grad(dx, dy, w.codes, w.scales, w.offsets, w.table, w.group, v, A, scale);
    }
    return made.release();
  });
}

PyObject* quantized_lora_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes("quantized_lora_linear", count, 15)) return nullptr;
  return unless_watched(Py_None, [&] {
    if (linear_watched()) throw NeedsDispatcher();
    View x = view_of_input(args[0]);
    PackedArguments w(args + 1);
    OptionalView bias = optional_view_of(args[6]);
    Sequence A(args[7]), B(args[8]);
    OptionalView ids = optional_view_of(args[9]), plan = optional_view_of(args[10]);
    OptionalView scaling = optional_view_of(args[11]), ranks = optional_view_of(args[12]);
    OptionalView weights = optional_view_of(args[13]);
    double scale = number(args[14]);
    if (quantized_prefers_panels(x, w.codes, w.scales, w.offsets, w.table, w.group)) throw NeedsDispatcher();
    Ref made = Ref::taken(new_output(args[0], x, w.codes.sizes[0]));
    if (!made) throw Raised();
    View y = view_of(made);
    {
      WithoutGIL unlocked;
      quantized_linear(y, x, w.codes, w.scales, w.offsets, w.table, w.group, bias, nullptr, A, B, ids, nullptr, plan,
                       scaling, ranks, weights, scale);
    }
    return made.release();
  });
}

}  // namespace lora_kernels
