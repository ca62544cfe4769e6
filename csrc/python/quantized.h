// A linear layer whose weight is packed, with its adapters, from Python without the dispatcher.
#pragma once

#include <Python.h>

namespace lora_kernels {

// quantized_lora_linear(x, codes, scales, offsets, table, group, bias, A, B, ids, plan, scaling, ranks, weights, scale)
// -> y, new; None with nothing done where the dispatcher, or torch's products over panels, must see to it.
PyObject* quantized_lora_linear(PyObject*, PyObject* const* args, Py_ssize_t count);

// The op of this name without the dispatcher, see training.h; `new` makes its result.
PyObject* quantized_linear_op(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* quantized_linear_grad_op(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace lora_kernels
