// A linear layer and what its adapters add, from Python without the dispatcher.
#pragma once

#include <Python.h>

#include "../cpu/view.h"

namespace lora_kernels {

// A tensor [..., columns] like x, its elements not yet written; nullptr where Python raised.
PyObject* new_output(PyObject* like, const View& x, int64_t columns);

// Whether something is on that is to see a linear layer, or nothing is connected.
bool linear_watched();

// y = x Wᵀ + bias + s (x Aᵀ) Bᵀ, new; A and B list the adapters, plan (a table) and scaling may be None. x is the view
// of x_object. NeedsDispatcher or std::exception, with nothing done, where Python must see to it; nullptr where Python
// raised.
PyObject* linear_with(PyObject* x_object, const View& x, PyObject* weight, PyObject* bias, PyObject* A, PyObject* B,
                      PyObject* plan, PyObject* scaling, double scale);

// lora_linear(x, weight, bias, A, B, scale) -> y, or None with nothing done where Python must see to it.
PyObject* lora_linear(PyObject*, PyObject* const* args, Py_ssize_t count);

// connect_linear(function, watchers): torch's own product with a bias, for shapes that it computes faster; functions,
// besides those of `connect`: what one of them reports would see the product and not what is done here.
PyObject* connect_linear(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace lora_kernels
