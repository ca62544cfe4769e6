"""`lora_add_` straight from Python: the same results, and the dispatcher where something else is to see the call."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kernels as lk
from lora_kernels.ops import _dispatch
from lora_kernels.ops.low_rank import lora_add_
from lora_kernels.testing import bitwise_equal

pytestmark = pytest.mark.skipif(
    lora_add_.native is None, reason=f"needs the compiled extension: {_dispatch.extension_error}"
)
M, K, N, R, L = 6, 40, 24, 4, 3


def arguments(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    y, x, A, B = (torch.randn(shape, generator=generator).to(dtype) for shape in ((M, N), (M, K), (L, R, K), (L, N, R)))
    ids = torch.tensor([0, 1, -1, 2, 2, 0])
    return {"y": y, "x": x, "A": (A,), "B": (B,), "ids": ids, "indptr": None, "plan": None, "scaling": None,
            "ranks": None, "weights": None, "scale": 0.5}  # fmt: skip


def taken(args):
    """Whether the call goes past the dispatcher; its y is what the dispatcher gives, or untouched."""
    y, want = args["y"].clone(), args["y"].clone()
    lora_add_.direct(want, *list(args.values())[1:])
    done = lora_add_.native(y, *list(args.values())[1:])
    assert bitwise_equal(y, want if done else args["y"])
    return done


FORMS = {
    "stacked": {},
    "listed": lambda a: {"A": list(a["A"][0]), "B": list(a["B"][0])},
    "parameters": lambda a: {"A": [torch.nn.Parameter(t) for t in a["A"][0]], "B": list(a["B"][0])},
    "int32 ids": lambda a: {"ids": a["ids"].int()},
    "segments": lambda a: {"indptr": torch.tensor([0, 2, 6]), "ids": torch.tensor([2, 0])},
    "plan": lambda a: {"ids": None, "plan": lk.BatchPlan.from_ids(a["ids"], L).table},
    "scaling": lambda a: {"scaling": torch.tensor([1.0, 2.0, 3.0])},
    "ranks": lambda a: {"ranks": torch.tensor([1, 0, 4], dtype=torch.int32)},
    "mixture": lambda a: {"ids": a["ids"][:, None].expand(M, 2).contiguous(), "weights": torch.rand(M, 2)},
    "one adapter": lambda a: {"A": (a["A"][0][0],), "B": (a["B"][0][0],), "ids": None},
    "bfloat16": lambda a: arguments(torch.bfloat16),
    "float16": lambda a: arguments(torch.float16),
    "masters": lambda a: {k: arguments(torch.bfloat16)[k] for k in ("y", "x")},
    "float32 y": lambda a: {"x": a["x"].bfloat16()},
    "rows of more dimensions": lambda a: {"y": a["y"].view(2, 3, N), "x": a["x"].view(2, 3, K)},
    "rows with a stride": lambda a: {"x": torch.randn(M, K + 3)[:, :K]},
    "transposed factors": lambda a: {"A": (a["A"][0].mT.contiguous().mT,), "B": (a["B"][0].mT.contiguous().mT,)},
    "no rows": lambda a: {"y": a["y"][:0], "x": a["x"][:0], "ids": a["ids"][:0]},
}


@pytest.mark.parametrize("form", FORMS)
def test_takes(form):
    args = arguments()
    change = FORMS[form]
    assert taken({**args, **(change(args) if change else {})})


class Sub(torch.Tensor):
    pass


OTHERS = {
    "x to be copied": lambda a: {"x": a["x"].T.contiguous().T},
    "factors to be copied": lambda a: {"A": (torch.randn(L, R * 2, K * 2)[:, ::2, ::2],)},
    "ids to be copied": lambda a: {"ids": a["ids"].repeat_interleave(2)[::2]},
    "a negative view": lambda a: {"x": torch.randn(M, K, dtype=torch.complex64).conj().imag},
    "a negative view of odd strides": lambda a: {"x": torch._neg_view(torch.randn(M, K + 1)[:, :K])},
    "a negative view of one number": lambda a: {
        "A": (torch.randn(L, 1, K),),
        "B": (torch.randn(L, 1, 1, dtype=torch.complex64).conj().imag,),
        "y": a["y"][:, :1].contiguous(),
    },
    "a negative view with a dimension more": lambda a: {
        "A": (torch.randn(L, R, 1),),
        "x": torch.randn(M, dtype=torch.complex64).conj().imag.unsqueeze(-1),
    },
    "a subclass": lambda a: {"x": a["x"].as_subclass(Sub)},
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_leaves_to_the_dispatcher(other):
    args = arguments()
    assert not taken({**args, **OTHERS[other](args)})


def test_negative_views_are_negated():
    """Through the public function, wherever the view stands."""
    args = arguments()
    x = torch.randn(M, K, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    A, B = args["A"][0], args["B"][0]
    want = lk.bgmv(args["y"].clone(), x.clone(), A, B, args["ids"])
    assert bitwise_equal(lk.bgmv(args["y"].clone(), x, A, B, args["ids"]), want)


def test_bad_arguments():
    args = arguments()
    y = args["y"].clone()
    with pytest.raises(RuntimeError, match="id out of range"):
        lora_add_.native(y, *list({**args, "ids": args["ids"] + L}.values())[1:])
    with pytest.raises(RuntimeError, match="A does not fit x"):
        lora_add_.native(y, *list({**args, "x": args["x"][:, 1:]}.values())[1:])
    with pytest.raises(TypeError, match="must be real number"):
        lora_add_.native(y, *list({**args, "scale": "1"}.values())[1:])
    for wrong in ((y,), (*args.values(), b"")):
        with pytest.raises(TypeError, match="11 arguments"):
            lora_add_.native(*wrong)
    for bad in ({"x": None}, {"A": args["A"][0]}, {"A": (None,)}, {"ids": [0] * M}, {"x": args["x"].to_sparse()},
                {"x": args["x"].to("meta")}, {"x": args["x"].double()}):  # fmt: skip
        assert lora_add_.native(y, *list({**args, **bad}.values())[1:]) is False
    assert torch.equal(y, args["y"])


def test_what_offers_no_tensors_is_refused():
    for nothing in (object(), None):
        assert _dispatch.extension.connect(nothing, (), (), torch.Tensor.is_neg) is False
    with pytest.raises(TypeError, match="a capsule, two tuples"):
        _dispatch.extension.connect(None)
    assert taken_now(arguments())


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def bgmv(args):
    return lk.bgmv(args["y"].clone(), args["x"], args["A"], args["B"], args["ids"])


class TestWhoSeesCalls:
    @pytest.mark.parametrize("mode", (Seen, SeenFunctions))
    def test_modes(self, mode):
        args = arguments()
        with mode() as seen:
            bgmv(args)
        assert "lora_kernels.lora_add_.default" in seen.calls

    def test_profiler(self):
        args = arguments()
        with torch.profiler.profile() as profile:
            bgmv(args)
        assert "lora_kernels::lora_add_" in {event.name for event in profile.events()}

    def test_tracing(self):
        args = arguments()
        with pytest.warns(DeprecationWarning, match="torch.jit"):
            traced = torch.jit.trace(lambda x: bgmv({**args, "x": x}), (args["x"],), check_trace=False)
        assert "lora_kernels::lora_add_" in str(traced.graph)
        other = torch.randn(M, K)
        assert torch.equal(traced(other), bgmv({**args, "x": other}))

    def test_transforms(self):
        args = arguments()
        seen = []
        torch.func.functionalize(lambda x: (seen.append(taken_now(args)), x)[1])(args["x"])
        assert seen == [False]

    def test_nobody(self):
        assert taken_now(arguments())

    @pytest.mark.parametrize("mode", (torch.no_grad, torch.enable_grad, torch.inference_mode))
    def test_grad_modes_do_not_matter(self, mode):
        with mode():
            assert taken_now(arguments())


def taken_now(args):
    return lora_add_.native(args["y"].clone(), *list(args.values())[1:])


def test_factors_live_as_long_as_the_call():
    """The lock of the interpreter is open meanwhile: other threads may empty the lists."""
    size, stop = 1024, threading.Event()
    A, B = [torch.randn(16, size)], [torch.randn(size, 16)]
    x = torch.randn(64, size)
    want = lk.bgmv(torch.zeros(64, size), x, list(A), list(B), torch.zeros(64, dtype=torch.int64))
    lists = ([], [])

    def churn():
        while not stop.is_set():
            for of, factors in zip(lists, (A, B), strict=True):
                of[:] = [factors[0].clone()]

    churning = threading.Thread(target=churn)
    for of, factors in zip(lists, (A, B), strict=True):
        of[:] = [factors[0].clone()]
    churning.start()
    try:
        for _ in range(200):
            y = torch.zeros(64, size)
            lk.bgmv(y, x, *lists, torch.zeros(64, dtype=torch.int64))
            assert torch.equal(y, want)
    finally:
        stop.set()
        churning.join()
