// The extension module. Importing it registers the kernels of cpu/ and cuda/; the schemas live in Python.
//
// Besides, it holds what Python calls a hundred times for one token of a model or one step of its training, where the
// price of the dispatcher and of Python itself shows: `lora_add_`, `lora_linear` and the ops of training without the
// dispatcher, and the forward of a layer that is as it was.
#include <Python.h>

#include "../cpu/low_rank_add.h"
#include "calls.h"
#include "layers.h"
#include "linear.h"
#include "quantized.h"
#include "training.h"

namespace lora_kernels {
namespace {

// lora_add_(its arguments) -> bool: whether it was done here; nothing is written otherwise.
PyObject* add(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!takes("lora_add_", count, 11)) return nullptr;
  return unless_watched(Py_False, [&] {
    double scale = number(args[10]);
    View y = view_of_input(args[0]), x = view_of_input(args[1]);
    Sequence A(args[2]), B(args[3]);
    OptionalView ids = optional_view_of(args[4]), indptr = optional_view_of(args[5]), plan = optional_view_of(args[6]);
    OptionalView scaling = optional_view_of(args[7]), ranks = optional_view_of(args[8]);
    OptionalView weights = optional_view_of(args[9]);
    {
      WithoutGIL unlocked;
      low_rank_add(y, x, A, B, ids, indptr, plan, scaling, ranks, weights, scale);
    }
    return Ref::to(Py_True).release();
  });
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef methods[] = {
    {"lora_add_", fast(add), METH_FASTCALL, nullptr},
    {"lora_forward_", fast(training_forward), METH_FASTCALL, nullptr},
    {"lora_out_grads", fast(training_out_grads), METH_FASTCALL, nullptr},
    {"lora_in_grads_", fast(training_in_grads), METH_FASTCALL, nullptr},
    {"lora_linear_grads", fast(training_grads), METH_FASTCALL, nullptr},
    {"lora_weight_norm", fast(training_weight_norm), METH_FASTCALL, nullptr},
    {"lora_dropout", fast(training_dropout), METH_FASTCALL, nullptr},
    {"lora_linear", fast(lora_linear), METH_FASTCALL, nullptr},
    {"lora_down", fast(training_down), METH_FASTCALL, nullptr},
    {"quantized_linear", fast(quantized_linear_op), METH_FASTCALL, nullptr},
    {"quantized_linear_grad", fast(quantized_linear_grad_op), METH_FASTCALL, nullptr},
    {"quantized_lora_linear", fast(quantized_lora_linear), METH_FASTCALL, nullptr},
    {"connect", fast(connect), METH_FASTCALL, nullptr},
    {"connect_linear", fast(connect_linear), METH_FASTCALL, nullptr},
    {"connect_layers", fast(connect_layers), METH_FASTCALL, nullptr},
    {"remember", fast(remember), METH_FASTCALL, nullptr},
    {"recall", fast(recall), METH_FASTCALL, nullptr},
    {"forget", forget, METH_O, nullptr},
    {"remembered", remembered, METH_O, nullptr},
    {"repeat", fast(repeat), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace lora_kernels

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, lora_kernels::methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
