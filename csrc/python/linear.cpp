#include "linear.h"

#include <exception>

#include "../cpu/low_rank_add.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

PyObject* torch_linear = nullptr;
PyObject* linear_watchers = nullptr;

}  // namespace

PyObject* new_output(PyObject* like, const View& x, int64_t columns) {
  Ref shape = Ref::taken(PyTuple_New(x.dims));
  for (int64_t d = 0; shape && d < x.dims; ++d)
    PyTuple_SetItem(shape, d, PyLong_FromLongLong(d + 1 < x.dims ? x.sizes[d] : columns));
  return shape ? PyObject_CallMethod(like, "new_empty", "(O)", static_cast<PyObject*>(shape)) : nullptr;
}

bool linear_watched() { return !torch_linear || watched() || any_says_yes(linear_watchers); }

PyObject* linear_with(PyObject* x_object, const View& x, PyObject* weight, PyObject* bias, PyObject* A, PyObject* B,
                      PyObject* plan, PyObject* scaling, double scale) {
  if (linear_watched()) throw NeedsDispatcher();
  Sequence listed_A(A), listed_B(B);
  View W = view_of(weight);
  OptionalView b = optional_view_of(bias), routed = optional_view_of(plan), scaled = optional_view_of(scaling);
  bool whole = takes_linear(x, W, b);
  Ref y = Ref::taken(whole ? new_output(x_object, x, W.sizes[0])
                           : PyObject_CallFunctionObjArgs(torch_linear, x_object, weight, bias, nullptr));
  if (!y) return nullptr;
  {
    View out = view_of(y);
    WithoutGIL unlocked;
    if (whole)
      low_rank_linear(out, x, W, b, listed_A, listed_B, routed, scaled, scale);
    else
      low_rank_add(out, x, listed_A, listed_B, nullptr, nullptr, routed, scaled, nullptr, nullptr, scale);
  }
  return y.release();
}

PyObject* lora_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) {
    PyErr_SetString(PyExc_TypeError, "lora_linear takes 6 arguments");
    return nullptr;
  }
  double scale = PyFloat_AsDouble(args[5]);
  if (scale == -1.0 && PyErr_Occurred()) return nullptr;
  try {
    return linear_with(args[0], view_of_input(args[0]), args[1], args[2], args[3], args[4], Py_None, Py_None, scale);
  } catch (const std::exception&) {
  } catch (const NeedsDispatcher&) {
  }
  Py_RETURN_NONE;
}

PyObject* connect_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "connect_linear takes a function and a tuple");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(args[i]);
  torch_linear = args[0];
  linear_watchers = args[1];
  Py_RETURN_NONE;
}

}  // namespace lora_kernels
