"""PEFT's tuners that are LoRA's op with another core or scale: what each adds to x Wᵀ + b, in ``lora``'s arguments.

A tuner's own small tensors (a core, scales) are put into a factor by operations that autograd knows; where a tuner's A
is frozen they go into B, so that no gradient of A is computed. Each formula is that of PEFT's layer, in its names.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.lora_linear import _folded
from ..ops.structured import householder_factors
from ._peft_batch import plain_tensors
from ._peft_reason import _altered

Factors = tuple[Tensor, Tensor, float]  # A [R, K], B [N, R] and the scale


class Parts(NamedTuple):
    """One adapter of a layer: what it is made of, its rank, and what makes its factors."""

    tensors: dict[str, Tensor]
    rank: int
    factors: Callable[[], Factors]


class Relative(NamedTuple):
    """A tuner's layer class.

    Attributes:
        tuner: its name, for people.
        formula: what it adds to the base layer's output, for people.
        module, cls: where PEFT has the class; older versions lack some.
        adapters: the attribute whose keys are the adapters.
        dropout: the attribute with the adapters' dropouts, "" where it has none.
        parts: of a layer and an adapter, or why PEFT's own forward must run.
    """

    tuner: str
    formula: str
    module: str
    cls: str
    adapters: str
    dropout: str
    parts: Callable[[Any, str], Parts | str]


def _vera(layer: Any, name: str) -> Parts:
    A, B = layer.vera_A[name], layer.vera_B[name]
    d, b = layer.vera_lambda_d[name], layer.vera_lambda_b[name]
    return Parts(
        {"vera_A": A, "vera_B": B, "vera_lambda_d": d, "vera_lambda_b": b},
        A.shape[0],
        lambda: (*_folded(A[:, : layer.in_features], B[: layer.out_features], d, None, b), 1.0),
    )


def _adalora(layer: Any, name: str) -> Parts | str:
    A, E, B, ranknum = layer.lora_A[name], layer.lora_E[name], layer.lora_B[name], layer.ranknum[name]
    scale = layer.scaling[name]
    if type(scale) not in (float, int):
        return f"scaling is a {type(scale).__qualname__}"
    if not A.shape[0]:
        return "its rank is 0"
    return Parts(
        {"lora_A": A, "lora_E": E, "lora_B": B, "ranknum": ranknum},
        A.shape[0],
        lambda: (*_folded(A, B, E.float().flatten() * (scale / (ranknum + 1e-5)), None, None), 1.0),
    )


def _delora(layer: Any, name: str) -> Parts:
    A, B, bound = layer.delora_A[name], layer.delora_B[name], layer.delora_lambda[name]
    norms, rank = layer.delora_w_norm[name], layer.r[name]

    def factors() -> Factors:
        of_A, of_B = A.float().norm(dim=1).clamp(min=1e-4), B.float().norm(dim=0).clamp(min=1e-4)
        return *_folded(A, B, bound / rank / (of_A * of_B), norms, None), 1.0

    tensors = {"delora_A": A, "delora_B": B, "delora_lambda": bound, "delora_w_norm": norms}
    return Parts(tensors, A.shape[0], factors)


def _tinylora(layer: Any, name: str) -> Parts:
    A, B, P = layer.tinylora_A[name], layer.tinylora_B[name], layer.tinylora_P[name]
    v = layer.tinylora_v[name][layer._tinylora_v_key[name]]

    def factors() -> Factors:
        core = torch.einsum("i,ijk->jk", v.float(), P.float())
        return *_folded(A, B, core.T, None, None), 1.0

    return Parts({"tinylora_A": A, "tinylora_B": B, "tinylora_v": v}, A.shape[0], factors)


def _psoft(layer: Any, name: str) -> Parts | str:
    A, B = layer._psoft_A_cache[name], layer._psoft_B_cache[name]
    rotation, scale = layer.psoft_R[name], layer.scaling[name]
    cls = type(rotation)
    if cls.__module__ != "peft.tuners.psoft.layer" or cls.__qualname__ != "OrthLayer":
        return f"psoft_R is {cls.__qualname__}"
    if _altered(rotation.__dict__):
        return "psoft_R has hooks"
    if type(scale) not in (float, int):
        return f"scaling is a {type(scale).__qualname__}"
    own = {name: p for name, p in rotation._parameters.items() if p is not None}

    def factors() -> Factors:
        R = rotation.get_matrix().float()
        return *_folded(A, B, (R - torch.eye(*R.shape, device=R.device)).T, None, None), scale

    return Parts({"psoft_A": A, "psoft_B": B, **own}, A.shape[0], factors)


def _miss(layer: Any, name: str) -> Parts | str:
    if layer.miss_fn == "bat":
        return "MiSS 'bat' makes another weight"
    block = layer.miss_block[name]
    K, N = layer.in_features, layer.out_features

    def factors() -> Factors:
        wide = block.repeat(1, N // layer.miss_mini_r[name]) if layer.miss_fn == "mini" else block
        return _groups(wide.shape[0], K, wide.device), wide.float().T, 1.0

    return Parts({"miss_block": block}, block.shape[0], factors)


def _hra(layer: Any, name: str) -> Parts | str:
    U, weight = layer.hra_u[name], layer.base_layer.weight
    if layer.hra_apply_GS[name]:
        return "apply_GS makes its vectors orthogonal one after the other"
    if type(layer.base_layer) is not torch.nn.Linear:
        return f"its base is a {type(layer.base_layer).__qualname__}"
    return Parts({"hra_u": U}, U.shape[1], lambda: (*householder_factors(weight, U), 1.0))


@functools.cache  # a captured graph may read it
def _groups(R: int, K: int, device: torch.device) -> Tensor:
    """fp32 [R, K], the identity again and again: x Aᵀ are the sums over the groups of R columns of x."""
    with plain_tensors():
        return torch.eye(R, device=device).repeat(1, -(-K // R))[:, :K].contiguous()


#: In the order of the README's table.
RELATIVES = (
    Relative("VeRA", "λ_b∘(B (λ_d∘A x))", "vera", "Linear", "vera_lambda_d", "vera_dropout", _vera),
    Relative("AdaLoRA", "s/ranknum · B (E∘A x)", "adalora", "SVDLinear", "lora_A", "lora_dropout", _adalora),
    Relative("DeLoRA", "λ/r · B (A (w∘x) / ‖A‖‖B‖)", "delora", "DeloraLinear", "delora_A", "delora_dropout", _delora),
    Relative("TinyLoRA", "B (Σᵢ vᵢ Pᵢ) A x", "tinylora", "Linear", "tinylora_A", "tinylora_dropout", _tinylora),
    Relative("PSOFT", "s · B (R - I) A x", "psoft", "Linear", "psoft_R", "psoft_dropout", _psoft),
    Relative("HRA", "W (∏ᵢ (I - 2 ûᵢûᵢᵀ) - I) x", "hra", "HRALinear", "hra_u", "", _hra),
    Relative("MiSS", "Bᵀ (Σ of x's groups of r)", "miss", "MissLinear", "miss_block", "miss_dropout", _miss),
)


def peft_class(module: str, cls: str) -> type | None:
    """A layer class of PEFT's, None where this version has none."""
    try:
        return getattr(importlib.import_module(f"peft.tuners.{module}.layer"), cls, None)
    except ImportError:
        return None


CLASSES = {cls: relative for relative in RELATIVES if (cls := peft_class(relative.module, relative.cls)) is not None}


def relative_of(cls: type) -> Relative | None:
    """The tuner whose layers are of this class, or of one that derives from it."""
    return next((CLASSES[base] for base in cls.__mro__ if base in CLASSES), None)
