// The extension module. Importing it registers the kernels of cpu/ and cuda/; the schemas live in Python.
//
// Besides, it holds what Python calls a hundred times for one token of a model, where the dispatcher's price shows:
// `lora_add_` without the dispatcher, and `unchanged`, which tells whether what was read of a module still holds.
#include <Python.h>

#include <exception>

#include "cpu/low_rank_add.h"
#include "dlpack.h"

namespace lora_kernels {
namespace {

const dlpack::Exchange* exchange = nullptr;
PyObject* tensor_types = nullptr;  // exact types that are plain tensors
PyObject* watchers = nullptr;      // functions; what one of them reports would not see a call made here

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

View view_of(PyObject* object) {
  dlpack::Tensor t;
  if (!is_plain(object)) throw NeedsDispatcher();
  if (exchange->view_of_object(object, &t) != 0) {
    PyErr_Clear();
    throw NeedsDispatcher();
  }
  // The imaginary part of a conjugate is a view that torch negates when it is read; where it has more than one element
  // along a dimension, the stride is even.
  bool plain = t.dtype.code != dlpack::kFloat;
  for (int d = 0; d < t.ndim; ++d) plain |= t.shape[d] > 1 && t.strides[d] % 2 != 0;
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

// Views of a sequence of tensors, which it keeps alive.
struct Sequence {
  std::vector<PyObject*> objects;
  std::vector<View> views;

  explicit Sequence(PyObject* sequence) {
    bool list = PyList_Check(sequence);
    if (!list && !PyTuple_Check(sequence)) throw NeedsDispatcher();
    Py_ssize_t n = list ? PyList_Size(sequence) : PyTuple_Size(sequence);
    objects.reserve(n);
    views.reserve(n);
    for (Py_ssize_t i = 0; i < n; ++i) {
      PyObject* item = list ? PyList_GetItem(sequence, i) : PyTuple_GetItem(sequence, i);
      __builtin_prefetch(item);
      objects.push_back(item);
    }
    for (PyObject* item : objects) views.push_back(view_of(item));
    for (PyObject* item : objects) Py_INCREF(item);
  }
  ~Sequence() {
    for (PyObject* object : objects) Py_DECREF(object);
  }
  Sequence(const Sequence&) = delete;
  operator Views() const { return {views.data(), views.size()}; }
};

OptionalView optional_view_of(PyObject* object) {
  return object == Py_None ? OptionalView() : OptionalView(view_of(object));
}

struct WithoutGIL {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGIL() { PyEval_RestoreThread(state); }
};

bool watched() {
  for (Py_ssize_t i = 0, n = PyTuple_Size(watchers); i < n; ++i) {
    PyObject* answer = PyObject_CallNoArgs(PyTuple_GetItem(watchers, i));
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

// Fetch all at once, not one by one, what has left the caches since a model's last step.
void fetch(PyObject* lines) {
  char* const* line = reinterpret_cast<char* const*>(PyBytes_AsString(lines));
  for (Py_ssize_t i = 0, n = PyBytes_Size(lines) / sizeof(char*); i < n; ++i) __builtin_prefetch(line[i]);
}

// lora_add_(its arguments[, lines]) -> bool: whether it was done here; nothing is written otherwise.
PyObject* add(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count < 11 || count > 12 || (count == 12 && !PyBytes_Check(args[11]))) {
    PyErr_SetString(PyExc_TypeError, "lora_add_ takes 11 arguments, and bytes");
    return nullptr;
  }
  if (!exchange) Py_RETURN_FALSE;
  if (count == 12) fetch(args[11]);
  if (watched()) Py_RETURN_FALSE;
  double scale = PyFloat_AsDouble(args[10]);
  if (scale == -1.0 && PyErr_Occurred()) return nullptr;
  try {
    View y = view_of(args[0]), x = view_of(args[1]);
    Sequence A(args[2]), B(args[3]);
    OptionalView ids = optional_view_of(args[4]), indptr = optional_view_of(args[5]), plan = optional_view_of(args[6]);
    OptionalView scaling = optional_view_of(args[7]), ranks = optional_view_of(args[8]);
    OptionalView weights = optional_view_of(args[9]);
    WithoutGIL unlocked;
    low_rank_add(y, x, A, B, ids, indptr, plan, scaling, ranks, weights, scale);
  } catch (const NeedsDispatcher&) {
    Py_RETURN_FALSE;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_TRUE;
}

// connect(capsule, types, watchers) -> bool: read tensors of these exact types as the capsule offers, if it does.
PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "connect takes a capsule and two tuples");
    return nullptr;
  }
  auto* offered = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
  if (!offered) PyErr_Clear();
  while (offered && offered->major != 1) offered = offered->older;
  if (!offered || !offered->view_of_object) Py_RETURN_FALSE;
  exchange = offered;
  Py_INCREF(args[1]);
  Py_INCREF(args[2]);
  tensor_types = args[1];
  watchers = args[2];
  Py_RETURN_TRUE;
}

// The address of what torch keeps of a tensor's memory, or nullptr.
const char* storage_of(PyObject* tensor) {
  PyObject* storage = PyObject_CallMethod(tensor, "untyped_storage", nullptr);
  PyObject* address = storage ? PyObject_GetAttrString(storage, "_cdata") : nullptr;
  void* found = address ? PyLong_AsVoidPtr(address) : nullptr;
  Py_XDECREF(address);
  Py_XDECREF(storage);
  PyErr_Clear();
  return static_cast<const char*>(found);
}

// lines_of(tensors) -> bytes: addresses of what a call will read of the tensors besides their elements.
PyObject* lines_of(PyObject*, PyObject* tensors) {
  if (!exchange) return PyBytes_FromStringAndSize(nullptr, 0);
  std::vector<const char*> lines;
  try {
    Sequence sequence(tensors);
    for (size_t i = 0; i < sequence.views.size(); ++i) {
      // A tensor's sizes lie amid the rest that torch keeps of it.
      const char* sizes = reinterpret_cast<const char*>(sequence.views[i].sizes);
      const char* storage = storage_of(sequence.objects[i]);
      for (const char* line :
           {reinterpret_cast<const char*>(sequence.objects[i]), sizes - 64, sizes, sizes + 64, storage, storage + 64})
        lines.push_back(line);
    }
  } catch (const NeedsDispatcher&) {
    lines.clear();
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(lines.data()), lines.size() * sizeof(char*));
}

// unchanged(facts, lines)
PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t arguments) {
  if (arguments != 2 || !PyTuple_Check(args[0]) || !PyBytes_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "unchanged takes a tuple and bytes");
    return nullptr;
  }
  PyObject* facts = args[0];
  Py_ssize_t count = PyTuple_Size(facts);
  for (Py_ssize_t i = 0; i + 2 < count; i += 3) __builtin_prefetch(PyTuple_GetItem(facts, i));
  fetch(args[1]);
  for (Py_ssize_t i = 0; i + 2 < count; i += 3) {
    PyObject *object = PyTuple_GetItem(facts, i), *key = PyTuple_GetItem(facts, i + 1);
    PyObject* expected = PyTuple_GetItem(facts, i + 2);
    if (key == Py_None) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != expected) Py_RETURN_FALSE;
      continue;
    }
    if (!PyDict_Check(object)) Py_RETURN_FALSE;
    PyObject* found = PyDict_GetItemWithError(object, key);
    if (!found) {
      if (PyErr_Occurred()) return nullptr;
      found = Py_Ellipsis;
    }
    if (found != expected) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"lora_add_", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(add)), METH_FASTCALL, nullptr},
    {"connect", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(connect)), METH_FASTCALL, nullptr},
    {"lines_of", lines_of, METH_O, nullptr},
    {"unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(unchanged)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace lora_kernels

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, lora_kernels::methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
