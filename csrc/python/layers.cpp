#include "layers.h"

#include <stdint.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "linear.h"
#include "tensors.h"

namespace lora_kernels {
namespace {

constexpr size_t kMost = 4;  // states kept of a layer; each takes some kilobytes
constexpr intptr_t kLine = 64;

PyObject* hooks = nullptr;
PyObject* repeat_watchers = nullptr;
PyObject* keeper_type = nullptr;

// See `remember`.
struct Fact {
  Ref object, key, value;

  bool is_type() const { return key == Py_None; }
  bool is_items() const { return key == Py_Ellipsis; }

  bool holds() const {
    if (is_type()) return reinterpret_cast<PyObject*>(Py_TYPE(object)) == value;
    if (is_items()) return items_hold();
    PyObject* found = PyDict_GetItemWithError(object, key);
    if (!found && PyErr_Occurred()) PyErr_Clear();
    return (found ? found : Py_Ellipsis) == value;
  }

  bool items_hold() const {
    if (PyDict_Check(object)) return PyDict_Size(object) == 0;
    Py_ssize_t count = PyList_Size(object);
    if (count != PyTuple_Size(value)) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
      if (PyList_GetItem(object, i) != PyTuple_GetItem(value, i)) return false;
    return true;
  }

  bool valid() const {
    if (is_type()) return true;
    if (!is_items()) return PyDict_Check(object);
    return PyTuple_Check(value) && (PyList_Check(object) || (PyDict_Check(object) && PyTuple_Size(value) == 0));
  }
};

struct Call {
  Ref weight, bias, A, B, scaling;
  double scale;
};

struct State {
  PyObject* layer;  // alive, or its weak reference has had this state forgotten
  Ref key;
  long long hooks_made;
  Ref result;
  std::vector<Fact> facts;
  std::unique_ptr<Call> call;
  std::vector<const char*> lines;  // where in memory lies what the next recall and call will read
  size_t next = 0;                 // slot of the state that was asked for after this one

  int visit(visitproc visit, void* arg) const {
    for (const Ref* ref : {&key, &result}) Py_VISIT(static_cast<PyObject*>(*ref));
    for (const Fact& fact : facts)
      for (const Ref* ref : {&fact.object, &fact.key, &fact.value}) Py_VISIT(static_cast<PyObject*>(*ref));
    if (call)
      for (const Ref* ref : {&call->weight, &call->bias, &call->A, &call->B, &call->scaling})
        Py_VISIT(static_cast<PyObject*>(*ref));
    return 0;
  }
};

struct Layer {
  Ref weak;
  PyObject* keeper;  // borrowed from the layer's dictionary
  std::vector<size_t> slots;
};

// States move to no other slot; a slot may be given to another state. Never destroyed: at exit Python is gone first.
auto& states = *new std::vector<std::unique_ptr<State>>();
auto& layers = *new std::unordered_map<PyObject*, Layer>();
size_t last = 0;  // slot of the state asked for last

State* at(size_t slot) { return slot < states.size() ? states[slot].get() : nullptr; }

bool is_of(const State* state, PyObject* layer, PyObject* key) {
  if (!state || state->layer != layer) return false;
  if (state->key == key) return true;
  if (key == Py_None || state->key == Py_None) return false;
  int equal = PyObject_RichCompareBool(state->key, key, Py_EQ);
  if (equal < 0) PyErr_Clear();
  return equal == 1;
}

State* find(PyObject* layer, PyObject* key) {
  State* before = at(last);
  size_t found = before ? before->next : 0;
  if (!is_of(at(found), layer, key)) {
    auto entry = layers.find(layer);
    if (entry == layers.end()) return nullptr;
    const std::vector<size_t>& slots = entry->second.slots;
    auto slot = std::find_if(slots.begin(), slots.end(), [&](size_t slot) { return is_of(at(slot), layer, key); });
    if (slot == slots.end()) return nullptr;
    found = *slot;
    if (before) before->next = found;
  }
  last = found;
  return at(found);
}

long long hooks_made() {
  Ref count = Ref::taken(PyObject_GetAttrString(hooks, "next_id"));
  long long made = count ? PyLong_AsLongLong(count) : -1;
  if (PyErr_Occurred()) PyErr_Clear();
  return made;
}

bool holds(const State& state) {
  return state.hooks_made == hooks_made() &&
         std::all_of(state.facts.begin(), state.facts.end(), [](const Fact& fact) { return fact.holds(); });
}

void fetch(const char* line) {
  __builtin_prefetch(line);
  asm volatile("");  // GCC drops calls of a function that does nothing but prefetch
}

template <typename T>
void fetch(const T* from, size_t count) {
  const char* start = reinterpret_cast<const char*>(from);
  for (size_t i = 0; i < count * sizeof(T); i += kLine) fetch(start + i);
}

// Fetch what the state will read that followed the last one the last time, and where its successor says what that will.
void fetch_ahead() {
  const State* before = at(last);
  const State* next = before ? at(before->next) : nullptr;
  if (!next) return;
  for (const char* line : next->lines) fetch(line);
  fetch(next->facts.data(), next->facts.size());
  if (const State* then = at(next->next)) fetch(then->lines.data(), then->lines.size());
}

// The addresses behind which lies what reading dictionaries, lists and tensors touches.
class Lines {
public:
  void add(const void* start, intptr_t bytes = 1) {
    intptr_t first = reinterpret_cast<intptr_t>(start) & -kLine, end = reinterpret_cast<intptr_t>(start) + bytes;
    for (intptr_t line = first; line < end; line += kLine) lines_.push_back(reinterpret_cast<const char*>(line));
  }

  // A dictionary or list, and as much of what it points to as it says it takes.
  void add_container(PyObject* object) {
    Ref own = Ref::taken(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__basicsize__"));
    Ref all = Ref::taken(PyObject_CallMethod(object, "__sizeof__", nullptr));
    intptr_t bytes = own ? PyLong_AsSsize_t(own) : 0, behind = (all ? PyLong_AsSsize_t(all) : 0) - bytes;
    PyErr_Clear();
    add(object, bytes);
    const uintptr_t* words = reinterpret_cast<const uintptr_t*>(object);
    for (intptr_t i = 2; i < bytes / static_cast<intptr_t>(sizeof(words[0])); ++i)
      if (static_cast<uint64_t>(words[i]) >> 32)  // others are counts, which would cost a page fault's time to fetch
        add(reinterpret_cast<const void*>(words[i]), std::min<intptr_t>(behind, 5 * kLine));
  }

  void add_tensor(PyObject* tensor) {
    add(tensor);
    // The sizes lie amid the rest that torch keeps of a tensor.
    add(reinterpret_cast<const char*>(view_of(tensor).sizes) - kLine, 3 * kLine);
    Ref storage = Ref::taken(PyObject_CallMethod(tensor, "untyped_storage", nullptr));
    Ref address = storage ? Ref::taken(PyObject_GetAttrString(storage, "_cdata")) : Ref();
    if (address) add(PyLong_AsVoidPtr(address), 2 * kLine);
    PyErr_Clear();
  }

  void add_tensors(PyObject* list) {
    for (Py_ssize_t i = 0, n = PyList_Size(list); i < n; ++i) add_tensor(PyList_GetItem(list, i));
  }

  std::vector<const char*> taken() {
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
    return std::vector<const char*>(lines_);
  }

private:
  std::vector<const char*> lines_;
};

std::vector<const char*> lines_of(const State& state) {
  Lines lines;
  for (const Fact& fact : state.facts) {
    if (fact.is_type())
      lines.add(fact.object);
    else
      lines.add_container(fact.object);
  }
  if (const Call* call = state.call.get()) {
    try {
      lines.add_tensor(call->weight);
      lines.add_tensors(call->A);
      lines.add_tensors(call->B);
    } catch (const NeedsDispatcher&) {
    }
  }
  return lines.taken();
}

void forget(PyObject* layer) {
  auto entry = layers.find(layer);
  if (entry == layers.end()) return;
  Layer gone = std::move(entry->second);
  layers.erase(entry);
  std::vector<std::unique_ptr<State>> released;  // once nothing here refers to them: that may run any code
  for (size_t slot : gone.slots) released.push_back(std::move(states[slot]));
}

PyObject* layer_died(PyObject* address, PyObject*) {
  forget(static_cast<PyObject*>(PyLong_AsVoidPtr(address)));
  Py_RETURN_NONE;
}

PyMethodDef layer_died_method = {"layer_died", layer_died, METH_O, nullptr};

// What a layer's dictionary holds for its states: it tells the garbage collector what they refer to, often the layer
// itself. A copy of the dictionary refers to the same keeper, which stays that of the one layer.
constexpr const char* kKeeper = "_lora_kernels_states";

struct Keeper {
  PyObject_HEAD PyObject* layer;
};

Layer* kept_by(PyObject* keeper) {
  auto entry = layers.find(reinterpret_cast<Keeper*>(keeper)->layer);
  return entry == layers.end() || entry->second.keeper != keeper ? nullptr : &entry->second;
}

int keeper_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(reinterpret_cast<PyObject*>(Py_TYPE(self)));
  if (const Layer* layer = kept_by(self))
    for (size_t slot : layer->slots)
      if (int stop = states[slot]->visit(visit, arg)) return stop;
  return 0;
}

int keeper_clear(PyObject* self) {
  if (kept_by(self)) forget(reinterpret_cast<Keeper*>(self)->layer);
  return 0;
}

void keeper_dealloc(PyObject* self) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(self));
  PyObject_GC_UnTrack(self);
  keeper_clear(self);
  PyObject_GC_Del(self);
  Py_DECREF(type);
}

// A deep copy or a pickled layer has no states: None in their place.
PyObject* keeper_reduce(PyObject*, PyObject*) {
  return Py_BuildValue("O()", reinterpret_cast<PyObject*>(Py_TYPE(Py_None)));
}

PyMethodDef keeper_methods[] = {{"__reduce__", keeper_reduce, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyType_Slot keeper_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(keeper_traverse)},
                              {Py_tp_clear, reinterpret_cast<void*>(keeper_clear)},
                              {Py_tp_dealloc, reinterpret_cast<void*>(keeper_dealloc)},
                              {Py_tp_methods, keeper_methods},
                              {0, nullptr}};
PyType_Spec keeper_spec = {"lora_kernels._C.Keeper", sizeof(Keeper), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                           keeper_slots};

Ref new_keeper(PyObject* layer) {
  if (!keeper_type) keeper_type = PyType_FromSpec(&keeper_spec);
  Keeper* keeper = keeper_type ? PyObject_GC_New(Keeper, reinterpret_cast<PyTypeObject*>(keeper_type)) : nullptr;
  if (!keeper) return Ref();
  keeper->layer = layer;
  PyObject_GC_Track(keeper);
  return Ref::taken(reinterpret_cast<PyObject*>(keeper));
}

Ref dictionary_of(PyObject* layer) { return Ref::taken(PyObject_GetAttrString(layer, "__dict__")); }

Ref weak_reference(PyObject* layer) {
  Ref address = Ref::taken(PyLong_FromVoidPtr(layer));
  Ref callback = address ? Ref::taken(PyCFunction_New(&layer_died_method, address)) : Ref();
  return callback ? Ref::taken(PyWeakref_NewRef(layer, callback)) : Ref();
}

PyObject* type_error(const char* message) {
  PyErr_SetString(PyExc_TypeError, message);
  return nullptr;
}

std::unique_ptr<Call> call_of(PyObject* given) {
  auto item = [&](Py_ssize_t i) { return Ref::to(PyTuple_GetItem(given, i)); };
  double scale = PyFloat_AsDouble(PyTuple_GetItem(given, 5));
  return std::unique_ptr<Call>(new Call{item(0), item(1), item(2), item(3), item(4), scale});
}

// The key and the plan's table for the rows of x, borrowed; false where there is none yet.
bool route(PyObject* names, const View& x, PyObject** key, PyObject** table) {
  if (x.dims < 2 || x.sizes[x.dims - 1] == 0 || PyObject_Size(names) != x.sizes[0]) return false;
  Ref routings = Ref::taken(PyObject_GetAttrString(names, "_routings"));
  Ref rows = Ref::taken(PyLong_FromLongLong(x.numel() / x.sizes[x.dims - 1]));
  if (!routings || !rows || !PyDict_Check(routings)) return false;
  PyObject* routing = PyDict_GetItemWithError(routings, rows);
  if (!routing || !PyTuple_Check(routing) || PyTuple_Size(routing) != 2) return false;
  *key = PyTuple_GetItem(routing, 0);
  *table = PyTuple_GetItem(routing, 1);
  return true;
}

}  // namespace

PyObject* connect_layers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(args[1])) return type_error("connect_layers takes an object and a tuple");
  for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(args[i]);
  hooks = args[0];
  repeat_watchers = args[1];
  Py_RETURN_NONE;
}

PyObject* remember(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6 || !PyList_Check(args[4]) || PyList_Size(args[4]) % 3 != 0 ||
      !(args[5] == Py_None || (PyTuple_Check(args[5]) && PyTuple_Size(args[5]) == 6)))
    return type_error("remember takes a layer, a key, a count, a state, a list of facts and a call");
  std::unique_ptr<State> state(new State());
  state->layer = args[0];
  state->key = Ref::to(args[1]);
  state->hooks_made = PyLong_AsLongLong(args[2]);
  state->result = Ref::to(args[3]);
  state->facts.reserve(PyList_Size(args[4]) / 3);
  for (Py_ssize_t i = 0, n = PyList_Size(args[4]); i < n; i += 3) {
    auto item = [&](Py_ssize_t j) { return Ref::to(PyList_GetItem(args[4], j)); };
    state->facts.push_back({item(i), item(i + 1), item(i + 2)});
    if (!state->facts.back().valid()) return type_error("a fact is of a dictionary, of a type or of a list's items");
  }
  if (args[5] != Py_None) {
    state->call = call_of(args[5]);
    if (!PyList_Check(state->call->A) || !PyList_Check(state->call->B)) return type_error("A and B must be lists");
  }
  if (PyErr_Occurred()) return nullptr;
  Ref weak = weak_reference(args[0]);
  Ref dictionary = weak ? dictionary_of(args[0]) : Ref(), keeper = dictionary ? new_keeper(args[0]) : Ref();
  if (!keeper) return nullptr;
  state->lines = lines_of(*state);

  if (layers.find(args[0]) == layers.end()) {
    if (PyDict_SetItemString(dictionary, kKeeper, keeper) != 0) return nullptr;
    layers[args[0]] = {std::move(weak), keeper, {}};
  }
  Layer& layer = layers[args[0]];
  auto same = [&](size_t slot) { return is_of(at(slot), args[0], args[1]); };
  auto replaced = std::find_if(layer.slots.begin(), layer.slots.end(), same);
  if (replaced == layer.slots.end() && layer.slots.size() == kMost) replaced = layer.slots.begin();
  if (replaced != layer.slots.end()) {
    state.swap(states[*replaced]);
    std::rotate(replaced, replaced + 1, layer.slots.end());
  } else {
    size_t slot = std::find(states.begin(), states.end(), nullptr) - states.begin();
    if (slot == states.size()) states.emplace_back();
    states[slot] = std::move(state);
    layer.slots.push_back(slot);
  }
  Py_RETURN_NONE;
}

PyObject* recall(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return type_error("recall takes a layer and a key");
  fetch_ahead();
  const State* state = find(args[0], args[1]);
  if (!state) Py_RETURN_NONE;
  if (!holds(*state)) {
    forget(args[0]);
    Py_RETURN_NONE;
  }
  Py_INCREF(state->result);
  return state->result;
}

PyObject* forget(PyObject*, PyObject* layer) {
  auto entry = layers.find(layer);
  if (entry == layers.end()) Py_RETURN_NONE;
  Ref dictionary = dictionary_of(layer), keeper = Ref::to(entry->second.keeper);
  if (!dictionary || PyDict_DelItemString(dictionary, kKeeper) != 0) PyErr_Clear();
  forget(layer);
  Py_RETURN_NONE;
}

PyObject* remembered(PyObject*, PyObject* layer) {
  auto entry = layers.find(layer);
  return PyLong_FromSize_t(entry == layers.end() ? 0 : entry->second.slots.size());
}

PyObject* repeat(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return type_error("repeat takes a layer, x and names");
  fetch_ahead();
  if (!repeat_watchers || any_says_yes(repeat_watchers)) Py_RETURN_NONE;
  try {
    View x = view_of_input(args[1]);
    PyObject *key = Py_None, *table = Py_None;
    if (args[2] != Py_None && !route(args[2], x, &key, &table)) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    const State* state = find(args[0], key);
    if (!state || !state->call || !holds(*state)) Py_RETURN_NONE;  // `recall` forgets it
    const Call& call = *state->call;
    Ref weight = Ref::to(call.weight), bias = Ref::to(call.bias), A = Ref::to(call.A), B = Ref::to(call.B);
    Ref plan = Ref::to(table), scaling = Ref::to(table == Py_None ? Py_None : static_cast<PyObject*>(call.scaling));
    // In there other threads may run and have the state forgotten.
    return linear_with(args[1], x, weight, bias, A, B, plan, scaling, call.scale);
  } catch (const std::exception&) {  // Python's own forward words it
  } catch (const NeedsDispatcher&) {
  }
  Py_RETURN_NONE;
}

}  // namespace lora_kernels
