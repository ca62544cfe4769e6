"""The ops of a layer in training straight from Python: the same results, and the dispatcher where it must be asked."""

import contextlib
import importlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels.ops import _dispatch
from lora_kernels.ops import _lora_linear as ops
from lora_kernels.testing import bitwise_equal

lora_linear = importlib.import_module("lora_kernels.ops.lora_linear")
pytestmark = pytest.mark.skipif(
    ops.lora_forward_.native is None, reason=f"needs the compiled extension: {_dispatch.extension_error}"
)
M, K, N, R = 6, 40, 24, 4


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    vectors = {name: randn(N, dtype=torch.float32) for name in ("c", "e", "norms")}
    return {
        "y": randn(2, M // 2, N), "x": randn(2, M // 2, K), "other": randn(2, M // 2, N), "dy": randn(2, M // 2, N),
        "dx": randn(2, M // 2, K), "W": randn(N, K), "A": randn(R, K), "B": randn(N, R),
        "v": randn(M, R, dtype=torch.float32), "b": randn(N), "seed": torch.tensor([7]),
        **vectors, "none": torch.empty(0, dtype=dtype),
    }  # fmt: skip


#: What each op is called with: names of tensors, or values.
CALLS = [
    (ops.lora_down, ("x", "A", None, 0.0)),
    (ops.lora_down, ("x", "A", "seed", 0.25)),
    (ops.lora_forward_, ("y", "x", "A", "B", None, None, None, None, None, 0.0, 0.5)),
    (ops.lora_forward_, ("y", "x", "A", "B", "c", "other", "e", "b", "seed", 0.25, 0.5)),
    (ops.lora_out_grads, ("dy", "v", "B", None, None, None, 0.5, True, True)),
    (ops.lora_out_grads, ("dy", "v", "B", "y", "b", "c", 0.5, True, False)),
    (ops.lora_out_grads, ("dy", "v", "B", None, None, None, 0.5, False, True)),
    (ops.lora_in_grads_, ("dx", "v", "x", "A", "seed", 0.25, 0.5)),
    (ops.lora_in_grads_, ("dx", "v", None, "A", None, 0.0, 0.5)),
    (ops.lora_in_grads_, ("none", "v", "x", "A", None, 0, 1)),
    (ops.lora_weight_norm, ("W", "A", "B", "norms", 0.5)),
    (ops.lora_dropout, ("x", "seed", 0.25)),
]
EACH = pytest.mark.parametrize("op, call", [pytest.param(*c, id=f"{i}-{c[0].name}") for i, c in enumerate(CALLS)])


def given(call, of):
    return [of[a] if isinstance(a, str) else a for a in call]


def taken(op, args):
    """Whether the call goes past the dispatcher; what it gives has the dispatcher's bits, or all is as it was."""
    ours, theirs, before = ([a.clone() if isinstance(a, torch.Tensor) else a for a in args] for _ in range(3))
    got, want = op.native(*ours, op.new), op.direct(*theirs)
    if got is not None:
        assert all(map(bitwise_equal, as_tuple(got), as_tuple(want)))
    for a, b in zip(ours, before if got is None else theirs, strict=True):
        assert bitwise_equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return got is not None


def as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else results


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@EACH
def test_takes(op, call, dtype):
    assert taken(op, given(call, tensors(dtype)))


@EACH
def test_takes_masters_and_parameters(op, call):
    of = tensors(torch.bfloat16) | {name: torch.nn.Parameter(tensors()[name]) for name in ("A", "B")}
    with torch.no_grad():
        assert op.native(*given(call, of), op.new) is not None
        assert taken(op, given(call, of))


@EACH
@pytest.mark.parametrize("how", ("a subclass", "a negative view", "meta", "float64", "None"))
def test_leaves_to_the_dispatcher(op, call, how):
    of = tensors()
    change = {
        "a subclass": lambda t: t.as_subclass(type("Sub", (torch.Tensor,), {})),
        "a negative view": torch._neg_view,
        "meta": lambda t: t.to("meta"),
        "float64": torch.Tensor.double,
        "None": lambda t: None,
    }[how]
    args = given(call, of)
    args[0] = change(args[0])
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    assert op.native(*args, op.new) is None
    for a, b in zip(args, before, strict=True):
        same = torch.equal if isinstance(a, torch.Tensor) and not a.is_meta else lambda a, b: True
        assert same(a, b)


@EACH
def test_what_must_be_copied_is_the_dispatchers(op, call):
    of = tensors()
    args = given(call, {**of, "A": torch.randn(2 * R, 2 * K)[::2, ::2], "B": torch.randn(2 * N, 2 * R)[::2, ::2]})
    if any(name in call for name in ("A", "B")):
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        assert op.native(*args, op.new) is None
        assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, torch.Tensor))


@EACH
def test_bad_arguments(op, call):
    args = given(call, tensors())
    with pytest.raises(TypeError, match="arguments"):
        op.native(*args)
    with pytest.raises(TypeError, match="must be real number"):
        op.native(*["1" if type(a) in (int, float) else a for a in args], op.new)
    short, at = list(args), next((i for i, a in enumerate(args) if getattr(a, "ndim", 0) == 2), None)
    if at is not None:
        short[at] = short[at][:, 1:].contiguous()
    if op is not ops.lora_dropout:
        with pytest.raises(RuntimeError):
            op.native(*short, op.new)
    with pytest.raises(ZeroDivisionError):
        op.native(*args, lambda *args: 1 // 0)
    for results in (None, torch.empty(3), torch.empty(10_000), (torch.empty(0),) * 4, [torch.empty(1)]):
        with contextlib.suppress(RuntimeError):  # of a size that it says is wrong
            assert op.native(*args, lambda *args, results=results: results) is None


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("seed", (None, torch.tensor([7])))
@pytest.mark.parametrize("need_x, need_A, need_B", itertools.product((True, False), repeat=3))
def test_both_gradients_in_one_call(dtype, seed, need_x, need_A, need_B):
    """The bits of the two ops."""
    of = tensors(dtype)
    got_dx, dx = ((of["dx"].clone() if need_x else of["none"]) for _ in range(2))
    x = of["x"] if need_A else None
    args = got_dx, of["dy"], of["v"], x, of["A"], of["B"], seed, 0.25 if seed is not None else 0.0, 0.5, need_B
    got = lora_linear._native_grads(*args, lora_linear._new_grads)
    dv, dB, _, _ = ops.lora_out_grads.direct(of["dy"], of["v"], of["B"], None, None, None, 0.5, True, need_B)
    dA = ops.lora_in_grads_.direct(dx, dv, x, of["A"], *args[6:9])
    for g, w in zip((*got, got_dx), (dA, dB, dx), strict=True):
        assert bitwise_equal(g, w)
    assert lora_linear._native_grads(*args[:1], of["dy"].double(), *args[2:], lora_linear._new_grads) is None
    with pytest.raises(RuntimeError):
        lora_linear._native_grads(*args[:2], of["v"][1:], *args[3:9], True, lora_linear._new_grads)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dora", (False, True))
def test_modes_and_profilers_see_a_step(dora):
    """Those that are on in the thread of the call; each op once."""
    of = tensors()
    leaves = {name: of[name].clone().requires_grad_() for name in ("x", "A", "B")}
    magnitude = of["norms"].abs().requires_grad_() if dora else None

    def step():
        y = lk.lora_linear(leaves["x"], of["W"], leaves["A"], leaves["B"], magnitude=magnitude)
        y.backward(of["dy"])

    wanted = {"lora_forward_", "lora_out_grads", "lora_in_grads_"} | ({"lora_weight_norm"} if dora else set())
    with Seen() as seen:
        step()
    assert {f"lora_kernels.{name}.default" for name in wanted} == {c for c in seen.calls if "lora_kernels" in c}
    with torch.profiler.profile() as profile:
        step()
    assert {f"lora_kernels::{name}" for name in wanted} == {
        e.name for e in profile.events() if "lora_kernels" in e.name
    }
