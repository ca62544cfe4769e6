"""What a LoRA layer's forward and backward pass must be before it is timed, and what it keeps between them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from compare import OURS
from torch import Tensor

from lora_kernels.testing import assert_within_rule, rms


@torch.enable_grad()
def passes(layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of x and of the layer's trainable weights by their names, without the layer's hooks."""
    x = x.detach().requires_grad_()
    weights = {name: weight for name, weight in layer.named_parameters() if weight.requires_grad}
    y = layer.forward(x)
    return {
        "y": y.detach(),
        **dict(zip(["x", *weights], torch.autograd.grad(y, [x, *weights.values()], dy), strict=True)),
    }


def check_layer(ours: Any, layer: Any, x: Tensor, dy: Tensor, what: str) -> None:
    """Hold our twin of PEFT's ``layer``, both in training, against the layer in float64 by the package's error rule.

    Where both draw dropout masks, their own ones, see :func:`check_dropped` for what they are held to.

    Raises:
        AssertionError: with the result that is wrong.
    """
    if any(isinstance(module, torch.nn.Dropout) for module in layer.lora_dropout.values()):
        return check_dropped(ours, layer, x, dy, what)
    plain = passes(layer, x, dy)
    oracle = passes(copy.deepcopy(layer).double(), x.double(), dy.double())
    for name, result in passes(ours, x, dy).items():
        # The terms of a weight's gradient, one a row of x, have signs of their own: their norm is the gradient's.
        noise = math.sqrt(len(x.flatten(0, -2))) * 2**-24 * rms(oracle[name])
        if "magnitude" in name:  # read off y, which is rounded twice
            noise = max(noise, 2 * rms(plain[name].double() - oracle[name]))
        assert_within_rule(result, oracle[name], plain[name], noise=noise, what=f"{OURS} {what}: {name}")


def check_dropped(ours: Any, layer: Any, x: Tensor, dy: Tensor, what: str) -> None:
    """Dropout takes away as much as PEFT's, adds nothing on average, and drops the same in both directions.

    The layers have no bias, so each row has dyᵀ y = dxᵀ x and each of the ranks has Aᵀ dA = Bᵀ dB, whatever the mask;
    with another mask in the backward pass neither holds.
    """
    base = passes(layer.base_layer, x, dy)
    layer.eval()
    still = {name: result.double() for name, result in passes(layer, x, dy).items()}
    layer.train()
    found = {"PEFT": passes(layer, x, dy), OURS: passes(ours, x, dy)}
    for name, want in still.items():
        part = want - base[name].double() if name in base else want
        off = {provider: results[name].double() - want for provider, results in found.items()}
        spread, shift = rms(off[OURS]) / rms(off["PEFT"]), float((off[OURS] * part).sum() / part.square().sum())
        few = 1 / math.sqrt(part.numel())
        if not (abs(spread - 1) <= 0.1 + 5 * few and abs(shift) <= 0.03 + few):
            raise AssertionError(f"{OURS} {what}: dropout changes {name} {spread:.3f} times as much, by {shift:+.3f}")
    rows = {name: rms(_dots(dy, got["y"]) - _dots(got["x"], x)) for name, got in found.items()}
    if not rows[OURS] <= 2 * rows["PEFT"]:
        raise AssertionError(f"{OURS} {what}: the mask of x's gradient is not that of y: {rows}")
    weights = dict(layer.named_parameters())
    a, b = (next(name for name in still if f"lora_{half}" in name) for half in "AB")
    of_a, of_b = _dots(found[OURS][a], weights[a]), _dots(found[OURS][b].T, weights[b].T)
    if not rms(of_a - of_b) <= 1e-3 * rms(of_b):
        raise AssertionError(f"{OURS} {what}: the mask of A's gradient is not that of y: {of_a} and {of_b}")


def exact_lora(x: Tensor, weight: Tensor, A: Tensor | None = None, B: Tensor | None = None, s: float = 2.0) -> Tensor:
    """x Wᵀ + s (x Aᵀ) Bᵀ in float64."""
    y = x.double() @ weight.double().T
    return y if A is None or B is None else y + s * (x.double() @ A.double().T) @ B.double().T


@torch.enable_grad()
def check_quantized(ours: Any, layer: Any, weight: Tensor, x: Tensor, dy: Tensor, what: str) -> None:
    """:func:`check_layer` where the base is packed: PEFT's ``layer`` is plain PyTorch, ``weight`` what its base holds.

    Raises:
        AssertionError: with the result that is wrong.
    """
    A, B = (half["default"].weight for half in (layer.lora_A, layer.lora_B))
    leaves = [t.detach().double().requires_grad_() for t in (x, A, B)]
    y = exact_lora(leaves[0], weight, *leaves[1:], s=layer.scaling["default"])
    exact = [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    found, peers = (list(passes(one, x, dy).values()) for one in (ours, layer))
    for name, result, want, peer in zip(("y", "x", "A", "B"), found, exact, peers, strict=True):
        noise = math.sqrt(len(x.flatten(0, -2))) * 2**-24 * rms(want)
        assert_within_rule(result, want, peer, noise=noise, what=f"{OURS} {what}: {name}")


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of each row, in float64."""
    return (a.detach().double() * b.detach().double()).sum(-1)


@torch.enable_grad()
def kept(layer: Any, x: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, beyond the weights, x and y."""
    storages = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    known = {t.untyped_storage().data_ptr() for t in (x, y, *layer.parameters())}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in known)


@torch.no_grad()
def errors(layers: dict[str, Any], x: Tensor, share: float) -> dict[str, float]:
    """Relative RMS error of y against float64, by provider, where the RMS of LoRA's part is ``share`` of the base's.

    Args:
        layers: twins, PEFT's among them; what B is multiplied with is undone.
    """
    layer = layers["PEFT"]
    exact = copy.deepcopy(layer).double()
    base = exact.base_layer(x.double())
    factor = share * rms(base) / rms(exact(x.double()) - base)
    B = layer.lora_B["default"].weight
    before = B.clone()
    try:
        exact.lora_B["default"].weight.copy_(B.mul_(factor))
        oracle = exact(x.double())
        return {name: rms(twin(x).double() - oracle) / rms(oracle) for name, twin in layers.items()}
    finally:
        B.copy_(before)
