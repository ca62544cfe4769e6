"""Launches that are repeated: the same kernels with the same numbers as Triton's own launches, at the new addresses."""

from unittest.mock import patch

import pytest
import torch
from driver import TARGETS, CompileOnlyDriver
from lora_kernels.kernels.triton import _device, low_rank
from triton.runtime import driver

SM_90 = next(target for target in TARGETS if target.name == "sm_90")
launched = []


class Launcher:
    """Notes what would be launched: the grid and the arguments."""

    def __init__(self, src, metadata):
        self.name = src.fn.__name__

    def __call__(self, x, y, z, stream, function, metadata, launch, enter, leave, *args):
        launched.append((self.name, (x, y, z), args))


class LaunchingDriver(CompileOnlyDriver):
    """A GPU that takes every launch and runs none."""

    launcher_cls = Launcher

    class utils:
        @staticmethod
        def load_binary(name, kernel, shared, device):
            return 1, 1, 32, 0, 1024

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": SM_90.gpu.shared, "warpSize": 32, "multiprocessor_count": 132}


@pytest.fixture(autouse=True)
def launching():
    active = patch.object(driver, "_active", LaunchingDriver(SM_90.triton))
    with active, patch.object(_device, "gpu", lambda device: SM_90.gpu):
        yield


def call(M=6, R=16, form="stacks", routing="plan", shift=0, dtype=torch.bfloat16, k=1, columns=None):
    """The arguments of lora_add_; ``shift``: by how many elements x misses its alignment."""
    K, N, L, S = 64, 48, 3, 2 if form == "packed" else 1
    x = torch.randn(M * K + shift).to(dtype)[shift:].view(M, K)
    y = torch.randn(M, columns or S * N).to(dtype)[:, : S * N]
    A, B = torch.randn(L, S * R, K).to(dtype), [torch.randn(L, N, R).to(dtype) for _ in range(S)]
    A, B = (list(A), list(B[0])) if form == "list" else ((A,), tuple(B))
    ids = torch.randint(-1, L, (M, k) if k > 1 else (M,))
    weights = torch.rand(M, k) if k > 1 else None
    plan = torch.zeros(3 + L + M * k, dtype=torch.int32)
    ids, plan = (None, plan) if routing == "plan" else (ids[::1] if routing == "ids" else ids.repeat(2)[::2], None)
    return y, x, A, B, ids, None, plan, torch.rand(L), None, weights, 0.5


def launches_of(op, args):
    """What a call launches, addresses told as the number of the argument, or of the other one in order, they are of."""
    launched.clear()
    op(*args)
    tensors = [t for a in args for t in (a if isinstance(a, (tuple, list)) else (a,)) if isinstance(t, torch.Tensor)]
    known = {t.data_ptr(): i for i, t in enumerate(tensors)}

    def plain(value):
        if isinstance(value, torch.Tensor):
            return "at", known.setdefault(value.data_ptr(), len(known))
        return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else value

    return [(name, grid, tuple(map(plain, args))) for name, grid, args in launched]


KINDS = (
    {},
    {"M": 7},
    {"R": 8},
    {"form": "list"},
    {"form": "packed"},
    {"routing": "ids"},
    {"shift": 1},
    {"shift": 8},
    {"dtype": torch.float32},
    {"k": 2},
)


def test_as_triton_launches():
    """Kinds in turn, so that none is taken for another."""
    for _ in range(3):
        for kind in KINDS:
            args = call(**kind)
            want = launches_of(low_rank.lora_add_.__wrapped__, args)
            assert launches_of(low_rank.lora_add_, args) == want, kind
            assert {name for name, _, _ in want} >= {"shrink_kernel", "expand_kernel"}


def test_the_second_call_repeats():
    for kind in KINDS:
        low_rank.lora_add_(*call(**kind))
        args = call(**kind)
        launched.clear()
        assert low_rank.lora_add_.replay(args), kind
        assert launched


def test_what_was_not_seen_is_not_repeated():
    low_rank.lora_add_(*call(M=5))
    launched.clear()
    for kind in ({"M": 5, "shift": 1}, {"M": 5, "columns": 96}, {"M": 5, "R": 24}, {"M": 11}):
        assert not low_rank.lora_add_.replay(call(**kind)), kind
    assert not launched


def test_work_beside_launches_is_not_repeated():
    """Strided ids are copied at each call."""
    for _ in range(2):
        args = call(routing="strided ids")
        assert not args[4].is_contiguous()
        assert launches_of(low_rank.lora_add_, args) == launches_of(low_rank.lora_add_.__wrapped__, args)
    assert not low_rank.lora_add_.replay(args)


def test_two_tensors_at_one_address_are_not_told_apart():
    y, x, A, B, *rest = call()
    y = x[:, :48]
    for _ in range(2):
        low_rank.lora_add_(y, x, A, B, *rest)
    assert not low_rank.lora_add_.replay((y, x, A, B, *rest))


class Subclass(torch.Tensor):
    pass


def test_what_a_kernel_cannot_read_as_it_is_is_not_repeated():
    y, x, *rest = call(dtype=torch.float32)
    low_rank.lora_add_(y, x, *rest)
    assert low_rank.lora_add_.replay((y, x, *rest))
    strided, negative = torch.complex(x, x).imag, torch.complex(x, x).conj().imag
    assert negative.is_neg()
    low_rank.lora_add_(y, strided, *rest)
    assert low_rank.lora_add_.replay((y, strided, *rest))
    for other in (negative, x.as_subclass(Subclass), "x", None):
        assert not low_rank.lora_add_.replay((y, other, *rest))
