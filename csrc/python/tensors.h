// Tensors as Python hands them over, read without the dispatcher.
#pragma once

#include <Python.h>

#include <utility>
#include <vector>

#include "../cpu/low_rank_arguments.h"

namespace lora_kernels {

// A strong reference.
class Ref {
public:
  Ref() = default;
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }

  static Ref to(PyObject* object) {
    Py_XINCREF(object);
    return taken(object);
  }
  // What Python gave as the caller's own; nullptr after an error.
  static Ref taken(PyObject* object) {
    Ref ref;
    ref.object_ = object;
    return ref;
  }
  PyObject* release() { return std::exchange(object_, nullptr); }
  operator PyObject*() const { return object_; }

private:
  PyObject* object_ = nullptr;
};

// Whether Python gave what it takes to read tensors.
bool connected();

// Whether something is on in this thread that is to see the ops called; once connected.
bool watched();

// Whether one of the functions in the tuple answers what is true in Python, or raises, which is cleared.
bool any_says_yes(PyObject* functions);

// A view of a plain tensor on the CPU; NeedsDispatcher for any other object, and where nothing is connected. The second
// form asks torch, too, whether it negates the tensor when it is read, which the first can only guess from the strides.
View view_of(PyObject* object);
View view_of_input(PyObject* object);
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

// connect(capsule, types, watchers, is_neg) -> bool: read tensors of these exact types as the capsule offers, if it
// does. `watchers`: functions; what one of them reports would not see a call made here. `is_neg`: whether a tensor is
// negated lazily.
PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace lora_kernels
