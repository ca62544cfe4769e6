"""How a call on a GPU finds the CUDA kernel: with a stand-in for the kernel, on the CPU."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import _dispatch
from lora_kernels.ops._low_rank import lora_add_, lora_shrink
from lora_kernels.select import Choice, Gpu


def arguments(dtype=torch.bfloat16, rows=4, factors=None):
    x, y = torch.randn(rows, 40).to(dtype), torch.randn(rows, 24).to(dtype)
    A, B = torch.randn(3, 8, 40).to(factors or dtype), torch.randn(3, 24, 8).to(factors or dtype)
    return y, x, [A], [B], torch.arange(rows) % 3, None, None, None, None, None, 1.0


@pytest.fixture
def took(monkeypatch):
    """The kernels that calls took, in order, on a GPU that CUDA's are faster on."""
    taken = []
    for op in (lora_add_, lora_shrink):
        monkeypatch.setattr(op, "cuda", lambda *args: taken.append("cuda"))
        monkeypatch.setattr(op, "triton", lambda *args: taken.append("triton"))
        monkeypatch.setattr(op, "reference", lambda *args: taken.append("reference"))
        monkeypatch.setattr(op, "_known", set())
        monkeypatch.setitem(op.__dict__, "_launch", None)
    monkeypatch.setattr(_dispatch, "has_triton", lambda family: True)
    monkeypatch.setattr(_dispatch, "compiled_for", lambda device: True)
    on(monkeypatch, Gpu((9, 0), 227 * 1024, cuda=True))
    return taken


def on(monkeypatch, gpu):
    monkeypatch.setattr("lora_kernels.ops._low_rank.gpu", lambda device: gpu)


def test_the_faster_one(took, monkeypatch):
    lora_add_.on_gpu(*arguments())
    lora_add_.on_gpu(*arguments(factors=torch.float32))
    on(monkeypatch, Gpu((9, 0), 227 * 1024))
    lora_add_.on_gpu(*arguments())
    assert took == ["cuda", "triton", "triton"]


def test_the_only_one(took, monkeypatch):
    on(monkeypatch, Gpu((9, 0), 227 * 1024))
    monkeypatch.setattr(_dispatch, "has_triton", lambda family: False)
    lora_add_.on_gpu(*arguments())
    lora_add_.on_gpu(*arguments(torch.float64))
    assert took == ["cuda", "reference"]


def test_what_it_refuses(took):
    """Each reason is named, and another kernel takes the call."""
    y, x, A, B, *rest = arguments()
    wide = [torch.randn(3, 512, 40)], [torch.randn(3, 24, 512)]
    refused = {
        "fp64": (y.double(), x.double(), [A[0].double()], [B[0].double()]),
        "more than 64": (y, x, [torch.randn(4, 40)] * 65, [torch.randn(24, 4)] * 65),
        "16-bit factors of fp32 rows": (y.float(), x.float(), A, B),
        "float16 y": (y.half(), x, A, B),
        "more than 8 dimensions": (y.view(4, *[1] * 8, 24), x.view(4, *[1] * 8, 40), A, B),
    }
    for reason, args in refused.items():
        assert reason in lora_add_.cuda_refuses(*args, *rest)
        lora_add_.on_gpu(*args, *rest)
    assert took == ["triton"] * len(refused)
    assert lora_add_.cuda_refuses(y, x, *wide, *rest) is None
    assert "fp64" in lora_add_.cuda_refuses(y, x, A, B, *rest[:-2], torch.ones(4, 1, dtype=torch.float64), 1.0)


def test_a_gpu_it_is_not_compiled_for(took, monkeypatch):
    monkeypatch.setattr(_dispatch, "compiled_for", lambda device: False)
    lora_add_.on_gpu(*arguments())
    monkeypatch.setattr(_dispatch, "has_triton", lambda family: False)
    lora_add_.on_gpu(*arguments())
    assert took == ["triton", "reference"]


def test_a_gpu_with_little_shared_memory(took, monkeypatch):
    y, x, _, _, *rest = arguments()
    on(monkeypatch, Gpu((8, 6), 99 * 1024, cuda=True))
    for rank, dtype, fits in ((512, torch.float32, False), (256, torch.float32, True), (512, torch.bfloat16, True)):
        A, B = [torch.randn(3, rank, 40, dtype=dtype)], [torch.randn(3, 24, rank, dtype=dtype)]
        assert (lora_add_.cuda_refuses(y, x, A, B, *rest) is None) == fits, (rank, dtype)


def test_a_call_of_a_known_kind_is_not_checked_again(took):
    """Only where nothing is on that is to see ops called, and not for one with another size, layout or dtype."""
    assert not lora_add_.repeat(arguments())
    lora_add_.on_gpu(*arguments())
    assert lora_add_.repeat(arguments())
    assert took == ["cuda"] * 2
    assert not lora_add_.repeat(arguments(rows=5))
    assert not lora_add_.repeat(arguments(torch.float16))
    y, x, *rest = arguments()
    assert not lora_add_.repeat((y, x.T.contiguous().T, *rest))
    for wrong in ((y, None, *rest), (y, x, (), *rest[1:]), (y, x, (1,), *rest[1:]), ()):  # left to the checks
        assert not lora_add_.repeat(wrong)
    with torch.autograd.profiler.profile():
        assert not lora_add_.repeat(arguments())
    lora_add_._known.clear()
    assert not lora_add_.repeat(arguments())


def test_forcing_triton_leaves_nothing_behind(took, monkeypatch):
    """What is noted of its launches may not serve a call of the same kind that is CUDA's."""

    def launch(*args):
        pytest.fail("noted")

    launch.__wrapped__ = lambda *args: took.append("triton, not noted")
    monkeypatch.setitem(lora_add_.__dict__, "_launch", launch)
    monkeypatch.setattr(lora_add_, "backends", lambda: {"triton", "cuda"})
    monkeypatch.setattr(_dispatch, "choose", lambda *args, **named: Choice("triton", ""))
    with lk.backend("triton"):
        lora_add_(*arguments())
    assert took == ["triton, not noted"]


def test_an_op_with_a_result_always_goes_the_whole_way(took, monkeypatch):
    result = torch.empty(0)
    monkeypatch.setattr(lora_shrink, "cuda", lambda *args: result)
    _, x, A, *_ = arguments()
    args = (x, A, None, None, None, None, 4)
    assert lora_shrink.on_gpu(*args) is result
    assert not lora_shrink.repeat(args)
