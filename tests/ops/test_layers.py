"""States of modules, kept by the extension: recalled while their facts hold, and repeated in one compiled call."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

import lora_kernels as lk
from lora_kernels.ops import _dispatch
from lora_kernels.ops.low_rank import lora_add_
from lora_kernels.testing import bitwise_equal

pytest.importorskip("peft")  # it connects the extension to torch's linear

from lora_kernels.integrations import _peft_layer  # noqa: F401

C = _dispatch.extension
pytestmark = pytest.mark.skipif(C is None, reason=f"needs the compiled extension: {_dispatch.extension_error}")
M, K, N, R = 6, 40, 24, 4
KEPT = 4


class Layer(nn.Module):
    pass


def remember(layer, key=None, state="state", facts=(), call=None):
    C.remember(layer, key, RemovableHandle.next_id, state, list(facts), call)


class TestRecall:
    def test_facts(self):
        """An entry, its absence, a type and a list's items; once one is broken all is forgotten."""
        layer, thing, held = Layer(), Layer(), [1000, "a"]
        holder, hooks = {"key": 1000.5, "none": None}, {}
        facts = [holder, "key", holder["key"], holder, "none", None, holder, "absent", ..., thing, None, Layer,
                 held, ..., tuple(held), hooks, ..., ()]  # fmt: skip
        for break_it, mend in (
            (lambda: holder.update(key=float("1000.5")), lambda: holder.update(key=facts[2])),  # equal, but another
            (lambda: holder.pop("key"), lambda: holder.update(key=facts[2])),
            (lambda: holder.update(none=False), lambda: holder.update(none=None)),
            (lambda: holder.update(absent=None), lambda: holder.pop("absent")),
            (lambda: setattr(thing, "__class__", nn.Module), lambda: setattr(thing, "__class__", Layer)),
            (lambda: hooks.update(a=1), lambda: hooks.clear()),
            (lambda: held.append("b"), lambda: held.pop()),
            (lambda: held.reverse(), lambda: held.reverse()),
            (lambda: held.pop(), lambda: held.append("a")),
        ):
            state = object()
            remember(layer, state=state, facts=facts)
            remember(layer, ("another",))
            assert C.recall(layer, None) is state
            assert C.recall(layer, None) is state
            break_it()
            assert C.recall(layer, None) is None
            assert C.remembered(layer) == 0
            mend()

    def test_a_hook_made_anywhere(self):
        layer = Layer()
        remember(layer)
        nn.Linear(1, 1).register_forward_hook(print).remove()
        assert C.recall(layer, None) is None

    def test_keys(self):
        layer, other = Layer(), Layer()
        for key in (None, (), ("a",), ("a", "b")):
            remember(layer, key, state=key or "nothing")
        for _ in range(2):
            assert C.recall(layer, tuple(["a", "b"])) == ("a", "b")
            assert C.recall(layer, ("a",)) == ("a",)
            assert C.recall(layer, None) == C.recall(layer, ()) == "nothing"
            assert C.recall(layer, ("b", "a")) is None
            assert C.recall(other, None) is None
        assert C.remembered(layer) == 4

    def test_keeps_few(self):
        layer = Layer()
        remember(layer, ("0",), "old")
        for i in range(KEPT):
            remember(layer, (str(i),), i)
        assert C.remembered(layer) == KEPT
        remember(layer, ("new",), "new")
        assert C.remembered(layer) == KEPT
        assert [C.recall(layer, (str(i),)) for i in range(KEPT)] == [None, 1, 2, 3]
        assert C.recall(layer, ("new",)) == "new"

    def test_lets_go(self):
        """Of what it keeps, when it is replaced, forgotten, or the layer dies."""
        layer = Layer()
        for end in (remember, C.forget):
            state = Layer()
            gone = weakref.ref(state)
            remember(layer, state=state, facts=[state.__dict__, "key", ...])
            del state
            assert gone() is not None
            end(layer)
            assert gone() is None
        state, kept = Layer(), Layer()
        gone = weakref.ref(state)
        remember(layer, state=state, facts=[state.__dict__, "key", ..., kept, None, Layer])
        del state, layer
        gc.collect()
        assert gone() is None

    def test_cycles_are_collected(self):
        """Through whatever a state refers to: the facts, the state itself, the call."""
        for tied in (
            lambda layer: dict(facts=[layer.__dict__, "key", ...]),
            lambda layer: dict(state=[layer]),
            lambda layer: dict(call=(layer, None, [], [], None, 1.0)),
        ):
            layer = Layer()
            remember(layer, ("key",), **tied(layer))
            gone = weakref.ref(layer)
            del layer
            gc.collect()
            assert gone() is None

    def test_copies(self):
        """A copy has no states, and what happens to it is nothing to the layer it was copied from."""
        layer = Layer()
        remember(layer)
        shallow = copy.copy(layer)
        for other in (shallow, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert C.remembered(other) == 0
            assert C.recall(other, None) is None
            remember(other, state="other")
            C.forget(other)
            assert C.recall(layer, None) == "state"
        second = copy.copy(layer)
        gone = weakref.ref(layer)
        del layer
        assert gone() is None
        assert C.remembered(second) == 0

    def test_what_is_let_go_may_call_back(self):
        layers = [Layer() for _ in range(3)]

        class Last:
            def __del__(self):
                C.forget(layers[1])
                remember(layers[0], ("from", "within"))
                remember(layers[2], state=Last() if len(layers) < 3 else None)

        for end in (remember, C.forget):
            remember(layers[0], state=Last())
            remember(layers[1])
            end(layers[0])
            assert C.remembered(layers[1]) == 0
            assert C.recall(layers[0], ("from", "within")) == "state"
            assert C.remembered(layers[2]) == 1

    def test_bad_arguments(self):
        layer, facts = Layer(), [{}, "key", ...]
        for wrong in (
            (), (layer,), (layer, None, 0, None, tuple(facts), None), (layer, None, 0, None, facts[:2], None),
            (layer, None, 0, None, [layer, "key", ...], None), (layer, None, 0, None, [layer, ..., ()], None),
            (layer, None, 0, None, [[], ..., []], None), (layer, None, 0, None, [{}, ..., (1,)], None),
            (layer, None, 0, None, facts, (1, 2)),
            (layer, None, "0", None, facts, None), (1, None, 0, None, facts, None),
            (layer, None, 0, None, facts, (None, None, (), (), None, 1.0)),
            (layer, None, 0, None, facts, (None, None, [], [], None, "1")),
        ):  # fmt: skip
            with pytest.raises(TypeError):
                C.remember(*wrong)
        assert C.remembered(layer) == 0
        for function in (C.recall, C.repeat, C.connect_layers):
            with pytest.raises(TypeError, match="takes"):
                function(layer)


class Names(tuple):
    """The samples' adapters, with their routing where it is known."""

    def __new__(cls, names, routings):
        return super().__new__(cls, names)

    def __init__(self, names, routings):
        self._routings = routings


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


NAMES = ("a", "b", "a")
KEY = ("a", "b")


@pytest.fixture
def layer():
    """Remembered for its one adapter, and for a mixed batch of two."""
    layer = Layer()
    layer.W, layer.bias = nn.Parameter(torch.randn(N, K)), nn.Parameter(torch.randn(N))
    layer.A = [nn.Parameter(torch.randn(R, K)) for _ in range(2)]
    layer.B = [nn.Parameter(torch.randn(N, R)) for _ in range(2)]
    layer.scaling = torch.tensor([0.5, -2.0])
    layer.facts = {"key": None}
    facts = [layer.facts, "key", None]
    remember(layer, None, "one", facts, (layer.W, layer.bias, layer.A[:1], layer.B[:1], None, 0.25))
    remember(layer, KEY, "two", facts, (layer.W, None, layer.A, layer.B, layer.scaling, 1.0))
    return layer


def routed(layer):
    ids = torch.tensor([0, 0, 1, 1, 0, 0], dtype=torch.int32)
    return Names(NAMES, {M: (KEY, lk.BatchPlan.from_ids(ids, 2).table)})


def expected(layer, x, names=None):
    mixed = names is not None
    y = linear(x, layer.W, None if mixed else layer.bias)
    table = names._routings[M][1] if mixed else None
    A, B = (layer.A, layer.B) if mixed else (layer.A[:1], layer.B[:1])
    scaling, scale = (layer.scaling, 1.0) if mixed else (None, 0.25)
    lora_add_.direct(y, x, A, B, None, None, table, scaling, None, None, scale)
    return y


class TestRepeat:
    @pytest.fixture(autouse=True)
    def without_gradients(self):
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("mixed", (False, True))
    def test_gives_what_the_ops_give(self, layer, mixed):
        names, x = routed(layer) if mixed else None, torch.randn(3, 2, K)
        for change in (
            lambda: None,
            lambda: layer.W.mul_(2),
            lambda: setattr(layer.A[0], "data", torch.randn(K, R).T),
            lambda: setattr(layer.B[0], "data", torch.randn(N, R)),
        ):
            change()
            y = C.repeat(layer, x, names)
            assert y.shape == (3, 2, N)
            assert type(y) is torch.Tensor
            assert bitwise_equal(y, expected(layer, x, names))

    def test_layers_in_any_order(self, layer):
        """What follows what is a hint and no more."""
        others, nothing = [Layer() for _ in range(3)], ([torch.zeros(R, K)], [torch.zeros(N, R)], None, 1.0)
        for i, other in enumerate(others):
            remember(other, None, i, [], (torch.full((N, K), float(i)), None, *nothing))
        x = torch.ones(2, K)
        for order in ([0, 1, 2], [0, 1, 2], [2, 2, 0], [1, 0, 2], [0, 1, 2]):
            for i in order:
                assert torch.equal(C.repeat(others[i], x, None), torch.full((2, N), float(i * K)))
            C.forget(others[0])
            assert C.repeat(others[0], x, None) is None
            remember(others[0], None, 0, [], (torch.zeros(N, K), None, *nothing))

    def test_leaves_to_python(self, layer):
        names, x = routed(layer), torch.randn(3, 2, K)
        for bad_x in (
            x.double(), x.to(torch.complex64), x.to("meta"), x.to_sparse(), x.as_subclass(Sub), None, "x",
        ):  # fmt: skip
            assert C.repeat(layer, bad_x, None) is None
        for bad_names in (
            NAMES, Names(NAMES[:2], names._routings), Names(NAMES, {}), Names(NAMES, []), Names(NAMES, {M: KEY}),
            Names(NAMES, {M: (("b",), None)}), object(),
        ):  # fmt: skip
            assert C.repeat(layer, x, bad_names) is None
        assert C.repeat(layer, x[0, 0], names) is None
        assert C.repeat(layer, x[:, :, :0], names) is None
        assert C.repeat(Layer(), x, None) is None
        with torch.enable_grad():
            assert C.repeat(layer, x, None) is None
        with torch.autocast("cpu"):
            assert C.repeat(layer, x, None) is None
        with Seen():
            assert C.repeat(layer, x, None) is None
        with lk.backend("cpu"):
            assert C.repeat(layer, x, None) is None
        assert torch.vmap(lambda t: torch.zeros(()) if C.repeat(layer, t, None) is None else None)(x).shape == (3,)
        remember(layer, None, "slow")
        assert C.repeat(layer, x, None) is None
        assert C.repeat(layer, x, names) is not None
        layer.facts["key"] = 1
        assert C.repeat(layer, x, names) is None

    def test_what_the_kernels_refuse(self, layer):
        """Python's own forward words it; a base layer that does not fit raises as ever."""
        x = torch.randn(3, 2, K)
        layer.A[0].data = torch.randn(R, K + 1)
        assert C.repeat(layer, x, None) is None
        layer.A[0].data = torch.randn(R, K).double()
        assert C.repeat(layer, x, None) is None
        layer.A[0].data = torch.randn(R, K)
        layer.W.data = torch.randn(N, K + 1)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            C.repeat(layer, x, None)

    def test_no_rows(self, layer):
        assert C.repeat(layer, torch.randn(0, K), None).shape == (0, N)

    def test_forgotten_meanwhile(self, layer):
        """The interpreter's lock is open while the base layer and the kernels run."""
        x, stop = torch.randn(3, 2, K), threading.Event()
        want = expected(layer, x)

        def churn():
            while not stop.is_set():
                C.forget(layer)
                for _ in range(50):
                    remember(layer, None, "one", [], (layer.W, layer.bias, layer.A[:1], layer.B[:1], None, 0.25))

        churning = threading.Thread(target=churn)
        churning.start()
        try:
            done = [y for _ in range(1000) if (y := C.repeat(layer, x, None)) is not None]
        finally:
            stop.set()
            churning.join()
        assert done
        assert all(torch.equal(y, want) for y in done)
