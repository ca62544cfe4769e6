// Tensors as Python hands them over, read without the dispatcher.
#pragma once

#include <Python.h>

#include <vector>

#include "../cpu/low_rank_arguments.h"

namespace lora_kernels {

// Whether Python gave what it takes to read tensors; without it nothing here may be called.
bool connected();

// Whether something is on in this thread that is to see the ops called.
bool watched();

// Whether one of the functions in the tuple answers what is true in Python, or fails.
bool any_says_yes(PyObject* functions);

// A view of a plain tensor on the CPU; NeedsDispatcher for any other object.
View view_of(PyObject* object);
OptionalView optional_view_of(PyObject* object);

// Views of a list or tuple of tensors, which it keeps alive.
struct Sequence {
  std::vector<PyObject*> objects;
  std::vector<View> views;

  explicit Sequence(PyObject* sequence);
  ~Sequence();
  Sequence(const Sequence&) = delete;
  operator Views() const { return {views.data(), views.size()}; }
};

struct WithoutGIL {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGIL() { PyEval_RestoreThread(state); }
};

// connect(capsule, types, watchers) -> bool: read tensors of these exact types as the capsule offers, if it does.
PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace lora_kernels
