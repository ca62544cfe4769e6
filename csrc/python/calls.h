// A call of an op straight from Python: what every one of them does around its own part.
#pragma once

#include <exception>

#include "tensors.h"

namespace lora_kernels {

// Thrown where Python has raised.
struct Raised {};

inline double number(PyObject* object) {
  double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw Raised();
  return value;
}

inline bool truth(PyObject* object) {
  int value = PyObject_IsTrue(object);
  if (value < 0) throw Raised();
  return value;
}

// What call() gives, its own reference; `otherwise` where the dispatcher must take the call, and nothing was done; or
// Python's error.
template <class F>
PyObject* unless_watched(PyObject* otherwise, const F& call) {
  try {
    if (!connected() || watched()) throw NeedsDispatcher();
    return call();
  } catch (const NeedsDispatcher&) {
    return Ref::to(otherwise).release();
  } catch (const Raised&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

inline bool takes(const char* name, Py_ssize_t count, Py_ssize_t expected) {
  if (count != expected) PyErr_Format(PyExc_TypeError, "%s takes %zd arguments", name, expected);
  return count == expected;
}

// args[count](args[0], ..., args[count - 1]).
inline Ref call_last(PyObject* const* args, Py_ssize_t count) {
  Ref given = Ref::taken(PyTuple_New(count));
  for (Py_ssize_t i = 0; given && i < count; ++i) PyTuple_SetItem(given, i, Ref::to(args[i]).release());
  Ref made = given ? Ref::taken(PyObject_CallObject(args[count], given)) : Ref();
  if (!made) throw Raised();
  return made;
}

}  // namespace lora_kernels
