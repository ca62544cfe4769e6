"""What a spectral adapter adds to a frozen layer's forward and backward pass: PEFT's layer, and the same patched.

An adapter's time is that of a pass with it less that of a pass of the same linear layer without, one after the other.
Ours is the median of several such pairs each round, since it is a small part of the layer's.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from allocator import keeping_freed_memory
from bench_training import timed
from compare import OURS, compare
from gradients import passes
from memory import allocations, resident
from roofs import Work
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.demo.measure import twin
from lora_kernels.demo.model import quiet
from lora_kernels.testing import assert_within_rule, rms

peft = pytest.importorskip("peft")

BASE, PEFT = "the layer alone", "PEFT"
PROVIDERS = (OURS, PEFT, BASE)
COUNT = 1000
WIDTHS, ROWS = (2048, 4096), (1, 64, 512)
PAIRS = {1: 31, 64: 15, 512: 9}  # of each round, by rows


class Method(NamedTuple):
    """A spectral adapter: what is said of it, PEFT's configuration, and what tells its transforms' work."""

    formula: str
    paper: str
    config: Callable[..., Any]
    options: dict[str, Any]
    flops: Callable[[int], float]  # of a transform of a row
    entries: int  # that a value stands for


METHODS = {
    "FourierFT": Method(
        "s · Re(ifft2(S))",
        "arXiv 2405.03003",
        peft.FourierFTConfig,
        {},
        lambda d: 2.5 * d * math.log2(d),
        2,
    ),
    "WaveFT": Method(
        "s · idwt2(S)",
        "arXiv 2505.12532",
        peft.WaveFTConfig,
        {"init_weights": False},
        lambda d: 2.0 * d,
        1,
    ),
}


@functools.lru_cache(maxsize=1)
def layers_of(name: str, d: int) -> dict[str, Any]:
    """The linear layer, PEFT's layer over it and that patched; ΔW has the norm of W."""
    torch.manual_seed(0)
    model, method = nn.Sequential(), METHODS[name]
    model.proj = base = nn.Linear(d, d, bias=False).requires_grad_(False)
    config = method.config(n_frequency=COUNT, target_modules=["proj"], **method.options)
    with quiet():
        model = peft.get_peft_model(model, config).train()
    layer = model.base_model.model.proj
    with torch.no_grad():
        for values in layer.parameters():
            if values.requires_grad:
                values.mul_(rms(base.weight) / rms(layer.get_delta_weight("default")))
    patched = twin(model)
    lk.patch(patched, strict=True)
    return {OURS: patched.base_model.model.proj, PEFT: layer, BASE: base}


@torch.enable_grad()
def check_layers(name: str, layers: dict[str, Any], x: Tensor, dy: Tensor, what: str) -> None:
    """Hold ours to the package's error rule, with PEFT's as plain PyTorch and the same in float64.

    Raises:
        AssertionError: with the result that is wrong.
    """
    layer = layers[PEFT]
    plain = passes(layer, x, dy)
    leaf, W = x.double().requires_grad_(), layers[BASE].weight.double()
    if name == "FourierFT":  # which PEFT computes in float32 whatever its dtype
        values = layer.fourierft_spectrum["default"].detach().double().requires_grad_()
        S = W.new_zeros(W.shape).index_put(tuple(layer.indices["default"]), values)
        delta = layer.fourierft_scaling["default"] * torch.fft.ifft2(S).real
    else:
        exact = copy.deepcopy(layer).double()
        values, delta = exact.waveft_spectrum["default"], exact.get_delta_weight("default")
    y = leaf @ (W + delta).T
    oracle = y.detach(), *torch.autograd.grad(y, (leaf, values), dy.double())
    lengths = layer.in_features, layer.out_features, len(x)
    found = passes(layers[OURS], x, dy)
    for (part, result), want, peer, length in zip(found.items(), oracle, plain.values(), lengths, strict=True):
        # The terms of each sum have signs of their own: their norm is the sum's.
        noise = math.sqrt(length) * 2**-24 * rms(want)
        assert_within_rule(result, want, peer, noise=noise, what=f"{OURS} {what}: {part}")


def added(dy: Tensor, layer: Any, base: Any, x: Tensor, pairs: int) -> float:
    """Seconds that the adapter of ``layer`` takes beyond ``base``: the median of so many pairs of passes."""
    run = partial(backward, dy)
    taken = []
    for i in range(pairs):
        one, other = (layer, base) if i % 2 else (base, layer)
        difference = timed(run, one, x) - timed(run, other, x)
        taken.append(difference if i % 2 else -difference)
    return statistics.median(taken)


def backward(dy: Tensor, layer: Any, x: Tensor) -> None:
    layer(x).backward(dy)


def work_of(name: str, M: int, d: int) -> Work:
    """The adapter's in y, dx and the values: each transform of x and dy once, one of each sum."""
    method = METHODS[name]
    flops = M * (4 * method.flops(d) + 3 * 2 * COUNT * method.entries)
    moved = 4 * (M * d * 6 + 2 * COUNT)  # x, dy; y and dx read and written; the values and their gradient
    return Work(int(flops), moved, torch.float32)


@pytest.fixture(
    scope="module", params=list(itertools.product(METHODS, WIDTHS, ROWS)), ids=lambda case: "-".join(map(str, case))
)
def adapter_case(request, rounds, roofs):
    name, d, M = request.param
    layers = layers_of(name, d)
    torch.manual_seed(M)
    x, dy = torch.randn(2, M, d)
    check_layers(name, layers, x, dy, f"{name}, {d}, {M} rows")
    run = partial(backward, dy)
    memory = {}
    for provider, layer in layers.items():
        step = partial(timed, run, layer, x)
        step()
        memory[provider] = (*allocations(step), resident(step))
    base = layers[BASE]
    with keeping_freed_memory() as kept:
        return compare(
            f"spectral {name}, {d}, {M} rows",
            {
                OURS: partial(added, dy, layers[OURS], base, x, PAIRS[M]),
                PEFT: partial(added, dy, layers[PEFT], base, x, 1),
                BASE: partial(timed, run, base, x),
            },
            rounds(7, 31, 30),
            roofs=roofs,
            probes=("read", "float32"),
            work={OURS: work_of(name, M, d)},
            memory=memory,
            freed_memory_kept=kept,
            method=name,
            formula=METHODS[name].formula,
            paper=METHODS[name].paper,
            n=COUNT,
            M=M,
            K=d,
            N=d,
        )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_adapter(replay, adapter_case, provider):
    replay(adapter_case, provider)
