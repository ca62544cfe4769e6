"""A layer in 4 or 8 bits with LoRA, and a QLoRA training step, beside bitsandbytes, PEFT over it, and bf16.

The base is NF4 in blocks of 64 as bitsandbytes packs it, which all share; bf16 has its numbers, rounded once. Before
each forward call that is timed, memory is read until nothing of the weight is left in the caches.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocator import keeping_freed_memory
from bench_peft import RANK, SHAPE, TARGETS, lora_layers
from bench_training import ROWS, TOKENS, loss_backward
from bench_training import timed as timed_training
from compare import OURS, check, compare
from gradients import check_quantized, exact_lora
from memory import allocations, resident
from roofs import Work, timed
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.demo.measure import twin
from lora_kernels.demo.model import quiet

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

K = N = 4096
L = 8
BNB, PEFT, DENSE, DENSE_PEFT = "bitsandbytes, no LoRA", "PEFT + bitsandbytes", "bf16, no LoRA", "PEFT, bf16"
ONE, MIXED = "one adapter", f"{L} adapters"
FORWARD = (OURS, BNB, PEFT, DENSE, DENSE_PEFT)
TRAINED = (OURS, PEFT, DENSE)
#: By rows: of our time over another's.
FORWARD_TARGETS = {
    1: {BNB: 1.15, PEFT: 0.05},
    8: {BNB: 1.2},
    16: {BNB: 1.2},
    32: {BNB: 1.2},
    512: {DENSE: 1.25},
}
TRAINED_TARGETS = {64: {PEFT: 0.2}, 512: {DENSE: 1.3}}
RETURNED = ", memory returned"  # by an allocator as it comes
STEP_TARGETS = {PEFT: 1 / 1.8}
FORMATS = {
    "nf4": {"fmt": "nf4"},
    "nf4, nested": {"fmt": "nf4", "nested": True},
    "fp4": {"fmt": "fp4"},
    "int4, groups of 128, zeros": {"fmt": "int4", "group_size": 128, "symmetric": False},
    "int8": {"fmt": "int8"},
}


class One(nn.Module):
    """A model of one layer."""

    is_loaded_in_4bit = True  # which PEFT asks before it takes bitsandbytes' layers

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.proj = layer


def in_4_bits(linear: nn.Linear) -> nn.Linear:
    """bitsandbytes' layer with the weight of ``linear``, quantised."""
    out_features, in_features = linear.weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
    )
    return layer.to("cpu").requires_grad_(False)


@functools.cache
def weights() -> tuple[Tensor, nn.Linear, nn.Linear, lk.QuantizedWeight]:
    """W in bf16, bitsandbytes' layer of it, the layer of what that unpacks to, and the packed weight, shared."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=False).bfloat16().requires_grad_(False)
    packed = in_4_bits(linear)
    weight = lk.QuantizedWeight.from_bitsandbytes(packed.weight)
    dense = nn.Linear(K, N, bias=False, device="meta").requires_grad_(False)
    dense.weight = nn.Parameter(lk.dequantize(weight, torch.bfloat16), requires_grad=False)
    return linear.weight, packed, dense, weight


def with_peft(base: nn.Module, A: Tensor, B: Tensor) -> Any:
    """PEFT's layer over ``base`` with these factors, s = 2."""
    config = peft.LoraConfig(r=len(A), lora_alpha=2 * len(A), target_modules=["proj"])
    with quiet():
        layer = peft.get_peft_model(One(base), config, autocast_adapter_dtype=False).base_model.model.proj
    for half, factor in ((layer.lora_A, A), (layer.lora_B, B)):
        half["default"].weight = nn.Parameter(factor.clone())
    return layer


def factors(dtype: torch.dtype, count: int = 1) -> tuple[Tensor, Tensor]:
    """A [L, R, K] and B [L, N, R] whose part is a fifth of the base's."""
    A, B = torch.randn(count, RANK, K) / K**0.5, torch.randn(count, N, RANK) / RANK**0.5
    return A.to(dtype), (0.06 * B).to(dtype)


def plain(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: float = 2.0) -> Tensor:
    """The same in plain PyTorch in x's dtype."""
    return F.linear(x, weight.to(x.dtype)) + s * F.linear(F.linear(x, A), B)


def work(weight_bytes: int, x: Tensor, *factors: Tensor) -> Work:
    """Of y = x Wᵀ + s (x Aᵀ) Bᵀ."""
    flops = 2 * len(x) * (N * K + sum(t.shape[-2] * t.shape[-1] for t in factors))
    return Work(flops, weight_bytes + sum(t.nbytes for t in (x, *factors)) + 2 * len(x) * N)


def cold(roofs, call, x):
    """Seconds of a call whose weight and factors are in no cache, as x is."""
    roofs.evict()
    x.sum()
    return timed(call)


@torch.enable_grad()
def in_training(layer, x):
    return layer(x)


@pytest.fixture(scope="module", params=FORWARD_TARGETS)
def forward_case(request, rounds, roofs):
    M = request.param
    torch.manual_seed(M)
    _, packed, dense, weight = weights()
    x, (A, B) = torch.randn(M, K).bfloat16(), factors(torch.bfloat16)
    A, B = A[0], B[0]
    leaf = x.clone().requires_grad_()
    repacked = copy.deepcopy(packed).eval()  # it puts its weight into another order at the first call
    over_packed, over_dense = with_peft(packed, A, B).train(), with_peft(dense, A, B).eval()
    calls = {
        OURS: partial(lk.quantized_lora_linear, x, weight, A, B, scaling=2.0),
        BNB: partial(repacked, x),
        PEFT: partial(in_training, over_packed, leaf),
        DENSE: partial(dense, x),
        DENSE_PEFT: partial(over_dense, x),
    }
    with torch.no_grad():
        results = {name: call().detach() for name, call in calls.items()}
        exact = lk.dequantize(weight, torch.float32)
        base = {name: results.pop(name) for name in (BNB, DENSE)}
        check(base, exact_lora(x, exact), dense(x), what=f"on {M} rows")
        check(results, exact_lora(x, exact, A, B), plain(x, exact, A, B), what=f"on {M} rows")
    of_4_bits, of_bf16 = weight.nbytes, dense.weight.nbytes
    return compare(
        f"quantized forward, {M} rows",
        {name: partial(cold, roofs, call, x) for name, call in calls.items()},
        rounds(31, 301, 30),
        roofs=roofs,
        probes=("read", "bfloat16"),
        work={
            OURS: work(of_4_bits, x, A, B),
            BNB: work(of_4_bits, x),
            PEFT: work(of_4_bits, x, A, B),
            DENSE: work(of_bf16, x),
            DENSE_PEFT: work(of_bf16, x, A, B),
        },
        targets=FORWARD_TARGETS[M],
        M=M,
        K=K,
        N=N,
        R=RANK,
    )


@pytest.mark.parametrize("provider", FORWARD)
def test_forward(replay, forward_case, provider):
    replay(forward_case, provider)


class Dense(nn.Module):
    """y = x Wᵀ, dx = dy W: what the base alone takes."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def backward(dy, layer, x):
    layer(x).backward(dy)


@functools.cache
def layers_in_training() -> tuple[dict[str, Any], dict[str, int]]:
    """The layers, with the same adapter, and the bytes of their weights."""
    torch.manual_seed(0)
    _, packed, dense, weight = weights()
    A, B = (t[0] for t in factors(torch.float32))
    layers = {
        OURS: lk.nn.QuantizedLoRALinear(weight, RANK, 2 * RANK).train(),
        PEFT: with_peft(packed, A, B).train(),
        DENSE: Dense(dense.weight.detach()),
    }
    with torch.no_grad():
        layers[OURS].A.copy_(A)
        layers[OURS].B.copy_(B)
    return layers, {OURS: weight.nbytes, PEFT: weight.nbytes, DENSE: dense.weight.nbytes}


def work_of_both(weight_bytes: int, M: int, rank: int) -> Work:
    """Of y, dx, dA and dB."""
    flops = 2 * M * (2 * N * K + 3 * rank * (N + K))
    return Work(flops, 2 * weight_bytes + 8 * rank * (N + K) + 4 * M * (N + K))


@pytest.fixture(
    scope="module",
    params=[(M, keep) for keep in (True, False) for M in TRAINED_TARGETS],
    ids=lambda case: f"{case[0]}-{'kept' if case[1] else 'returned'}",
)
def trained_case(request, rounds, roofs):
    M, keep = request.param
    torch.manual_seed(M)
    layers, sizes = layers_in_training()
    x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    exact = lk.dequantize(weights()[3], torch.float32)
    check_quantized(layers[OURS], layers[PEFT], exact, x, dy, f"on {M} rows")
    steps = {name: partial(timed_training, partial(backward, dy), layer, x) for name, layer in layers.items()}
    for step in steps.values():
        step()
    memory = {name: (*allocations(step), resident(step)) for name, step in steps.items()}
    with keeping_freed_memory() if keep else contextlib.nullcontext(False) as kept:
        return compare(
            f"quantized training, {M} rows{'' if keep else RETURNED}",
            steps,
            rounds(31, 61, 40),
            roofs=roofs,
            probes=("read", "bfloat16"),
            work={name: work_of_both(size, M, 0 if name == DENSE else RANK) for name, size in sizes.items()},
            targets=TRAINED_TARGETS[M],
            memory=memory,
            freed_memory_kept=kept,
            M=M,
            K=K,
            N=N,
            R=RANK,
        )


@pytest.mark.parametrize("provider", TRAINED)
def test_training(replay, trained_case, provider):
    replay(trained_case, provider)


@pytest.fixture(scope="module")
def mixed_case(rounds, roofs):
    torch.manual_seed(L)
    weight, x, (A, B) = weights()[3], torch.randn(L, K).bfloat16(), factors(torch.bfloat16, L)
    ids = torch.arange(L)
    calls = {
        ONE: partial(lk.quantized_lora_linear, x, weight, A[0], B[0], scaling=2.0),
        MIXED: partial(lk.quantized_multi_lora_linear, x, weight, A, B, ids, scaling=2.0),
    }
    exact = lk.dequantize(weight, torch.float32)
    for name, adapters in ((ONE, [0] * L), (MIXED, range(L))):
        rows = [(x[i : i + 1], exact, A[l], B[l]) for i, l in enumerate(adapters)]
        want, peer = (torch.cat([compute(*row) for row in rows]) for compute in (exact_lora, plain))
        check({OURS: calls[name]()}, want, peer, what=name)
    amounts = {ONE: work(weight.nbytes, x, A[0], B[0]), MIXED: work(weight.nbytes, x, A, B)}
    return compare(
        "quantized adapters",
        {name: partial(cold, roofs, call, x) for name, call in calls.items()},
        rounds(31, 301, 10),
        roofs=roofs,
        probes=("read", "bfloat16"),
        work=amounts,
        share=amounts[MIXED].bytes / amounts[ONE].bytes,
        M=L,
        K=K,
        N=N,
        R=RANK,
    )


@pytest.mark.parametrize("provider", (ONE, MIXED))
def test_mixed(replay, mixed_case, provider):
    replay(mixed_case, provider)


@functools.cache
def formats() -> dict[str, lk.QuantizedWeight]:
    return {name: lk.quantize(weights()[0], **options) for name, options in FORMATS.items()}


@pytest.fixture(scope="module", params=(1, 8, 512))
def format_case(request, rounds, roofs):
    M = request.param
    torch.manual_seed(M)
    x, (A, B) = torch.randn(M, K).bfloat16(), factors(torch.bfloat16)
    A, B = A[0], B[0]
    dense = weights()[2]
    calls = {DENSE: partial(dense, x)}
    for name, weight in formats().items():
        calls[name] = partial(lk.quantized_lora_linear, x, weight, A, B, scaling=2.0)
        exact = lk.dequantize(weight, torch.float32)
        check({OURS: calls[name]()}, exact_lora(x, exact, A, B), plain(x, exact, A, B), what=f"{name} on {M} rows")
    return compare(
        f"quantized formats, {M} rows",
        {name: partial(cold, roofs, call, x) for name, call in calls.items()},
        rounds(31, 101, 15),
        roofs=roofs,
        probes=("read", "bfloat16"),
        work={name: work(weight.nbytes, x, A, B) for name, weight in formats().items()},
        M=M,
        K=K,
        N=N,
        R=RANK,
    )


@pytest.mark.parametrize("provider", (DENSE, *FORMATS))
def test_formats(replay, format_case, provider):
    replay(format_case, provider)


@functools.cache
def models() -> dict[str, Any]:
    """A model of SmolLM2-135M's shape in 4 bits with PEFT's LoRA, in training, and its patched twin."""
    torch.manual_seed(0)
    with quiet():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).bfloat16().requires_grad_(False)
        for name, module in list(model.named_modules()):
            parent, _, child = name.rpartition(".")
            if child in TARGETS:
                setattr(model.get_submodule(parent), child, in_4_bits(module))
        model.is_loaded_in_4bit = True
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, init_lora_weights=False)
        model = peft.get_peft_model(model, config).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.15)
    patched = twin(model)
    lk.patch(patched, strict=True)
    return {PEFT: model, OURS: patched}


@pytest.fixture(scope="module", params=(True, False), ids=("kept", "returned"))
def step_case(request, rounds):
    keep = request.param
    ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    x = models()[PEFT].get_input_embeddings()(ids).detach()
    patched = lora_layers(models()[OURS])
    for name, layer in lora_layers(models()[PEFT]).items():
        if ".layers.0." in name:
            inputs = [torch.randn(ROWS, TOKENS, width).bfloat16() for width in (layer.in_features, layer.out_features)]
            weight = lk.QuantizedWeight.from_bitsandbytes(layer.base_layer.weight)
            check_quantized(patched[name], layer, lk.dequantize(weight, torch.float32), *inputs, name)
    run = partial(loss_backward, ids)
    with keeping_freed_memory() if keep else contextlib.nullcontext(False) as kept:
        return compare(
            f"quantized step{'' if keep else RETURNED}",
            {name: partial(timed_training, run, model, x) for name, model in models().items()},
            rounds(31, 61, 60),
            targets=STEP_TARGETS,
            freed_memory_kept=kept,
            rows=ROWS,
            tokens=TOKENS,
            R=RANK,
            model="SmolLM2-135M's shape, random weights",
        )


@pytest.mark.parametrize("provider", (PEFT, OURS))
def test_step(replay, step_case, provider):
    replay(step_case, provider)
