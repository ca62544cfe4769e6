// The ops of a layer in training, from Python without the dispatcher, which a step of a model calls some hundred times.
//
// Each takes the arguments of its op, and then a function that makes room for the results of such arguments: a tensor
// or a tuple of them. It returns these, or None, with nothing done, where the dispatcher must take the call.
#pragma once

#include <Python.h>

namespace lora_kernels {

PyObject* training_down(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* training_forward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* training_out_grads(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* training_in_grads(PyObject*, PyObject* const* args, Py_ssize_t count);
// lora_linear_grads(dx, dy, v, x, A, B, seed, p, scale, need_B, new): lora_out_grads and lora_in_grads_ of a layer
// without DoRA; the results are dA and dB.
PyObject* training_grads(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* training_weight_norm(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* training_dropout(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace lora_kernels
