#include "tensors.h"

#include "dlpack.h"

namespace lora_kernels {
namespace {

const dlpack::Exchange* exchange = nullptr;
PyObject* tensor_types = nullptr;  // exact types that are plain tensors
PyObject* call_watchers = nullptr;
PyObject* is_neg = nullptr;

ScalarType element_type(dlpack::DataType type) {
  if (type.lanes == 1) {
    if (type.code == dlpack::kFloat && type.bits == 32) return ScalarType::Float;
    if (type.code == dlpack::kFloat && type.bits == 16) return ScalarType::Half;
    if (type.code == dlpack::kBfloat && type.bits == 16) return ScalarType::BFloat16;
    if (type.code == dlpack::kInt && type.bits == 32) return ScalarType::Int;
    if (type.code == dlpack::kInt && type.bits == 64) return ScalarType::Long;
  }
  throw NeedsDispatcher();
}

bool is_plain(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  for (Py_ssize_t i = 0, n = PyTuple_Size(tensor_types); i < n; ++i)
    if (PyTuple_GetItem(tensor_types, i) == type) return true;
  return false;
}

}  // namespace

bool connected() { return exchange; }

bool watched() { return any_says_yes(call_watchers); }

bool any_says_yes(PyObject* functions) {
  for (Py_ssize_t i = 0, n = PyTuple_Size(functions); i < n; ++i) {
    PyObject* answer = PyObject_CallNoArgs(PyTuple_GetItem(functions, i));
    if (!answer) {
      PyErr_Clear();
      return true;
    }
    int yes = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (yes != 0) return true;
  }
  return false;
}

View view_of(PyObject* object) {
  dlpack::Tensor t;
  if (!exchange || !is_plain(object)) throw NeedsDispatcher();
  if (exchange->view_of_object(object, &t) != 0) {
    PyErr_Clear();
    throw NeedsDispatcher();
  }
  // The imaginary part of a conjugate is a view that torch negates when it is read; where it has more than one element
  // along a dimension, the stride is even.
  bool plain = t.dtype.code != dlpack::kFloat;
  for (int d = 0; d < t.ndim; ++d) plain |= t.shape[d] == 0 || (t.shape[d] > 1 && t.strides[d] % 2 != 0);
  if (t.device.type != dlpack::kCPU || !plain) throw NeedsDispatcher();
  View view;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.sizes = t.shape;
  view.strides = t.strides;
  view.dims = t.ndim;
  view.type = element_type(t.dtype);
  view.on_cpu = true;
  if (!t.data && view.numel() > 0) throw NeedsDispatcher();  // a tensor without memory, such as autograd's zeros
  return view;
}

View view_of_input(PyObject* object) {
  View view = view_of(object);
  Ref answer = Ref::taken(PyObject_CallFunctionObjArgs(is_neg, object, nullptr));
  if (!answer) PyErr_Clear();
  if (answer != Py_False) throw NeedsDispatcher();
  return view;
}

OptionalView optional_view_of(PyObject* object) {
  return object == Py_None ? OptionalView() : OptionalView(view_of(object));
}

Sequence::Sequence(PyObject* sequence) {
  bool list = PyList_Check(sequence);
  if (!list && !PyTuple_Check(sequence)) throw NeedsDispatcher();
  Py_ssize_t n = list ? PyList_Size(sequence) : PyTuple_Size(sequence);
  objects.reserve(n);
  views.reserve(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = list ? PyList_GetItem(sequence, i) : PyTuple_GetItem(sequence, i);
    views.push_back(view_of(item));
    objects.push_back(item);
  }
  for (PyObject* item : objects) Py_INCREF(item);
}

Sequence::~Sequence() {
  for (PyObject* object : objects) Py_DECREF(object);
}

PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "connect takes a capsule, two tuples and a function");
    return nullptr;
  }
  auto* offered = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (!offered) PyErr_Clear();
  while (offered && offered->major != 1) offered = offered->older;
  if (!offered || !offered->view_of_object) Py_RETURN_FALSE;
  exchange = offered;
  for (Py_ssize_t i = 1; i < count; ++i) Py_INCREF(args[i]);
  tensor_types = args[1];
  call_watchers = args[2];
  is_neg = args[3];
  Py_RETURN_TRUE;
}

}  // namespace lora_kernels
