// What was found out of a module, remembered with the facts it rests on, and recalled while these hold.
//
// Finding out what a PEFT layer is takes some hundred reads of its modules' dictionaries, and all of them have left the
// caches when the model's next step comes to it. So the facts are held against the layer in one loop, and before
// anything else what the layer will read is fetched: a model calls its layers in the same order each step. The fetched
// addresses are hints and no more; nothing is read through them.
#pragma once

#include <Python.h>

namespace lora_kernels {

// connect_layers(hooks, watchers): the object whose attribute `next_id` moves when a hook is made; functions: what one
// of them reports `repeat` leaves to Python.
PyObject* connect_layers(PyObject*, PyObject* const* args, Py_ssize_t count);

// remember(layer, key, hooks_made, state, facts, call)
//   key: a tuple of strings, or None.
//   hooks_made: the counter as it was before the layer was looked at.
//   facts: a flat sequence of threes. `dictionary, key, value`: an entry, by identity (Ellipsis: none there);
//     `object, None, type`: a type; `list, Ellipsis, tuple`: a list's items, by identity; `dictionary, Ellipsis, ()`:
//     it is empty.
//   call: (weight, bias, A, B, scaling, scale), what `repeat` adds; or None, where it is to leave the layer to Python.
PyObject* remember(PyObject*, PyObject* const* args, Py_ssize_t count);

// recall(layer, key) -> the state, or None. Where it no longer holds, all states of the layer are forgotten.
PyObject* recall(PyObject*, PyObject* const* args, Py_ssize_t count);

// forget(layer): all its states.
PyObject* forget(PyObject*, PyObject* layer);

// remembered(layer) -> how many states.
PyObject* remembered(PyObject*, PyObject* layer);

// repeat(layer, x, names) -> y = x Wᵀ + bias + the adapters' part, or None, with nothing done, where
// Python must see to it. names: None, or an object with `_routings`: rows -> (key, plan's table or None).
PyObject* repeat(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace lora_kernels
