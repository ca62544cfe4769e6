"""Samples, oracle and yardstick of the ``quantized`` family: layers with a packed weight, alone and with adapters.

Weights are made of random codes and scales, so that no quantiser is in the way. The dropout mask is
``reference.dropout``'s, which tests hold against the generator's published numbers; nothing else is shared with the
package.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantization.tables import FP4, INT4, NF4
from ..quantization.weight import QuantizedWeight
from .lora_linear import LORA_LINEAR_DTYPES, Expected, _mask
from .low_rank import Dtypes, Factors, _copy_into, _laid_out, low_rank_oracle, low_rank_plain
from .low_rank import _Case as _Adapters
from .low_rank import _make as _make_adapters
from .numerics import Sample, rms

#: Every combination of dtypes the layers take, by name.
QUANTIZED_DTYPES = LORA_LINEAR_DTYPES

# What makes a weight of about 1 of random codes, by format.
_UNIT = {"nf4": 2.0, "fp4": 2.0, "int4": 0.2, "int8": 1 / 64}


@dataclass(frozen=True)
class _Case:
    """A sample before it has a dtype: of ``quantized_linear``, with a rank of ``quantized_lora_linear``, and with
    ``multi``, what :mod:`~lora_kernels.testing.low_rank` makes adapters from, of ``quantized_multi_lora_linear``.

    ``group`` 0 is a whole row. ``bias`` may be "wide", fp32 whatever x is.
    """

    name: str
    rows: tuple[int, ...]
    K: int
    N: int
    fmt: str = "nf4"
    group: int = 64
    R: int = 0
    bias: bool | str = False
    offsets: bool = False
    order: bool = False
    table: str | None = None
    dropout: float = 0.0
    training: bool = True
    scaling: float | str | None = 0.7
    multi: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    x: str = "dense"
    factors: str = "dense"
    traits: tuple[str, ...] = ()


_CASES = (
    _Case("no-rows", (0,), 64, 48, bias=True),
    _Case("no-rows-lora-3d", (0, 5), 64, 48, R=8, dropout=0.5, bias=True),
    _Case("no-rows-multi", (0,), 64, 48, R=8, multi={"L": 3}),
    _Case("vector", (), 96, 300, "int4", 32, offsets=True, bias=True),
    _Case("vector-lora", (), 128, 300, R=8),
    _Case("vector-dropout", (), 96, 300, "fp4", 32, R=8, dropout=0.5, bias=True),
    _Case("one-row", (1,), 576, 576, bias=True),
    _Case("one-row-int4", (1,), 576, 300, "int4", 128, offsets=True, R=16),
    _Case("one-row-int8", (1,), 577, 300, "int8", 0, R=16, bias=True),
    _Case("one-row-multi", (1,), 576, 576, R=16, multi={"L": 9, "ids": "last"}),
    _Case("all-ones", (1,), 1, 1, R=1, scaling=1.0),
    _Case("all-ones-int8", (1,), 1, 1, "int8", 0, bias=True),
    _Case("one-in", (17,), 1, 63, "fp4", R=3, dropout=0.5),
    _Case("one-in-multi", (33,), 1, 63, "int4", 32, R=3, multi={"L": 2}),
    _Case("one-out", (300,), 63, 1, "int4", 8, R=3, bias=True),
    _Case("odd", (7,), 7, 63, "nf4", 8, R=3, bias=True),
    _Case("odd-int8", (7,), 7, 63, "int8", 0, R=3),
    _Case("m2", (2,), 128, 150, "fp4"),
    _Case("m2-int8", (2,), 128, 150, "int8", 0, R=8),
    _Case("m3", (3,), 192, 100, "int4", 64, offsets=True, R=4),
    _Case("m4", (4,), 256, 80, "nf4", 128, R=16, bias=True),
    _Case("m4-int8", (4,), 255, 81, "int8", 128),
    _Case("m5", (5,), 100, 65, "nf4", 32, R=5, bias=True),
    _Case("m5-multi", (5,), 192, 64, R=8, multi={"L": 3}),
    _Case("m7", (7,), 320, 96, "int4", 96, R=8),
    _Case("m8", (8,), 576, 160, R=16),
    _Case("m8-each", (8,), 576, 192, R=16, multi={"L": 8, "ids": "each"}, scaling=2.0),
    _Case("m9", (9,), 65, 47, "fp4", 8, R=7, dropout=0.05),
    _Case("m9-whole-row", (9,), 131, 64, "nf4", 0, R=8, bias=True),
    _Case("m16", (16,), 256, 128, R=64),
    _Case("m17", (17,), 63, 130, "int4", 32, offsets=True, R=17, bias=True, dropout=0.05),
    _Case("m31", (31,), 96, 40, "int8", 32, R=8),
    _Case("m31-multi", (31,), 96, 40, "int4", 32, offsets=True, R=8, multi={"L": 4}, bias=True),
    _Case("m33", (33,), 200, 72, "nf4", 8, R=1, dropout=0.5),
    _Case("m64", (64,), 128, 96, R=8, bias=True),
    _Case("m65", (65,), 96, 100, "fp4", 32, R=16, dropout=0.5, bias="wide"),
    _Case("m65-multi", (65,), 128, 100, R=33, multi={"L": 9}, scaling="adapter"),
    _Case("m129", (129,), 100, 72, "int4", 8, R=16),
    _Case("m129-int8", (129,), 130, 72, "int8", 0),
    _Case("m300", (300,), 1024, 576, R=16, bias=True, traits=("large",)),
    _Case("m300-short-group", (300,), 576, 1024, "int4", 128, offsets=True, R=8, dropout=0.05, traits=("large",)),
    _Case("m300-multi", (300,), 1024, 576, R=16, multi={"L": 4, "ids": "runs"}, traits=("large",)),
    _Case("m65-int8", (65,), 1024, 577, "int8", 0, R=8, bias=True, traits=("large",)),
    _Case("wide", (3,), 2500, 1111, R=8, traits=("large",)),
    _Case("group-of-1", (5,), 33, 70, "nf4", 1, R=8, offsets=True),
    _Case("group-of-3", (19,), 100, 70, "fp4", 3, R=8),
    _Case("group-of-7-int8", (5,), 100, 70, "int8", 7, bias=True),
    _Case("group-of-24", (6,), 200, 70, "int4", 24, offsets=True),
    _Case("group-of-40", (20,), 200, 70, "nf4", 40, R=8),
    _Case("r100", (17,), 72, 136, "nf4", 8, R=100),
    _Case("r100-multi", (17,), 72, 136, "int8", 0, R=100, multi={"L": 2}),
    _Case("order", (21,), 96, 40, "int4", 32, offsets=True, order=True, R=8, bias=True),
    _Case("order-alone", (21,), 63, 40, "int8", 32, order=True, bias=True),
    _Case("order-dropout", (21,), 63, 40, "int4", 32, offsets=True, order=True, R=8, dropout=0.5),
    _Case("order-multi", (21,), 96, 40, "int4", 32, offsets=True, order=True, R=8, multi={"L": 3}),
    _Case("order-3d", (3, 7), 64, 40, "int4", 32, order=True, R=8, x="blocks"),
    _Case("random-table", (12,), 128, 64, table="random", R=8),
    _Case("nf4-offsets", (12,), 100, 64, "nf4", 32, offsets=True, bias=True),
    _Case("int8-offsets", (12,), 100, 64, "int8", 32, offsets=True, R=8),
    _Case("bias-wide", (12,), 128, 64, bias="wide"),
    _Case("dropout-of-all", (9,), 64, 48, R=8, dropout=1.0, bias=True),
    _Case("dropout-of-none", (9,), 64, 48, R=8, dropout=0.5, training=False),
    _Case("scaling-of-zero", (9,), 64, 48, R=8, scaling=0.0),
    _Case("scaling-below-zero", (9,), 64, 48, R=8, scaling=-2.0, dropout=0.5),
    _Case("3d", (3, 11), 64, 48, R=8, dropout=0.5, bias=True),
    _Case("4d-blocks", (2, 3, 4), 40, 24, "nf4", 8, R=4, x="blocks"),
    _Case("x-columns", (12,), 96, 64, "nf4", 32, R=8, x="columns"),
    _Case("x-rows", (12,), 63, 64, R=8, x="rows", bias=True),
    _Case("x-transposed", (35,), 96, 64, "nf4", 32, R=8, x="transposed", dropout=0.5),
    _Case("x-transposed-alone", (35,), 96, 64, "int8", 0, x="transposed"),
    _Case("x-swapped", (5, 4), 63, 48, R=8, x="swapped"),
    _Case("x-expanded", (10,), 96, 64, "nf4", 32, R=8, x="expanded"),
    _Case("factors-transposed", (14,), 63, 72, "nf4", 32, R=9, factors="transposed"),
    _Case("factors-columns", (14,), 64, 72, R=16, factors="columns", dropout=0.5),
    _Case("multi-no-adapter", (9,), 64, 48, R=8, multi={"L": 3, "ids": "none"}),
    _Case("multi-int32-ids", (11,), 64, 72, R=8, multi={"L": 3, "ids_dtype": torch.int32}, bias=True),
    _Case("live-ranks", (29,), 100, 72, "nf4", 32, R=33, multi={"L": 5, "ids": "each", "ranks": "adapter"},
          scaling="adapter"),
    _Case("qkv", (13,), 192, 160, R=16, multi={"L": 4, "N": (96, 32, 32)}, scaling="slice", bias=True),
    _Case("gate-up-live-ranks", (18,), 63, 127, "int4", 32, offsets=True, R=17,
          multi={"L": 4, "N": (96, 31), "ranks": "slice"}, scaling="slice"),
    _Case("packed", (18,), 96, 104, R=16, multi={"L": 3, "N": (33, 64, 7), "ranks": "adapter"}, packed=True),
    _Case("listed", (23,), 100, 63, "nf4", 32, R=16, multi={"L": 4, "listed": (4, 16, 7, 1)}, scaling="adapter"),
    _Case("listed-live-ranks", (23,), 64, 63, "int8", 0, R=24,
          multi={"L": 3, "listed": (24, 8, 9), "ranks": "adapter"}),
    _Case("multi-transposed", (14,), 63, 72, R=9, multi={"L": 3}, factors="transposed", x="transposed"),
    _Case("multi-3d", (3, 7), 64, 64, R=8, multi={"L": 3, "N": (48, 16)}, x="blocks"),
    _Case("mixture-of-2", (9,), 96, 63, "nf4", 32, R=8, multi={"L": 4, "k": 2}, scaling="adapter", bias=True),
    _Case("mixture-of-3", (33,), 64, 64, R=16, multi={"L": 5, "N": (40, 24), "k": 3, "ranks": "slice"},
          scaling="slice"),
    _Case("mixture-order", (12,), 64, 40, "int4", 32, order=True, R=8, multi={"L": 3, "k": 2}),
    _Case("mixture-no-rows", (0,), 64, 40, R=8, multi={"L": 3, "k": 2}),
)  # fmt: skip


def quantized_samples(x: torch.dtype = torch.float32, factors: torch.dtype | None = None, *_: Any) -> list[Sample]:
    """The samples of the family in the given dtypes (``*QUANTIZED_DTYPES[name]``).

    Each makes every argument of one function, :func:`quantized_name` of them, a ``QuantizedWeight`` among them. What
    must not be read is NaN: what lies before and behind scales, offsets and table and between the rows of a strided x
    or factor, factors past the live rank and those of adapters without a row. Around the codes every bit is set, also
    in the half byte behind a last odd column.

    Traits: ``linear``, ``lora`` or ``multi``; ``mixture``; ``strided``; ``dropout``; ``large`` (slow for the oracle).

    Args:
        x: dtype of x.
        factors: dtype of A and B; x's where None.
    """
    return _samples(Dtypes(x, factors or x, x))


@functools.cache
def _samples(dtypes: Dtypes) -> list[Sample]:
    samples = []
    for case in _CASES:
        traits = {*case.traits, "multi" if case.multi else "lora" if case.R else "linear"}
        traits |= {"mixture"} if case.multi.get("k") else set()
        traits |= {"dropout"} if case.dropout and case.training else set()
        traits |= {"strided"} if {case.x, case.factors} != {"dense"} else set()
        samples.append(Sample(case.name, functools.partial(_make, case, dtypes), frozenset(traits)))
    return samples


def _make(case: _Case, dtypes: Dtypes, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    K, N, R = case.K, case.N, case.R
    bias_dtype = torch.promote_types(dtypes.x, torch.float32) if case.bias == "wide" else dtypes.x
    a: dict[str, Any] = {
        "x": _laid_out((*case.rows, K), case.x, dtypes.x, generator),
        "weight": quantized_weight(
            N, K, case.fmt, case.group, offsets=case.offsets, order=case.order, table=case.table, generator=generator
        ),
        "bias": random(N, dtype=bias_dtype) if case.bias else None,
    }
    if case.multi:
        factors = "dense" if case.packed else case.factors
        sizes = {"N": (N,), **case.multi}
        adapters = _Adapters(case.name, case.rows, K, R=R, scaling=case.scaling, factors=factors, **sizes)
        made = _make_adapters(adapters, dtypes, seed)
        a |= {name: made[name] for name in ("A", "B", "adapter_ids", "scaling", "ranks", "weights")}
        if case.packed:
            a["A"] = _packed(a["A"], a["ranks"].tolist())
    elif R:
        A, B = ((random(*size, dtype=torch.float64) / size[1] ** 0.5).to(dtypes.factors) for size in ((R, K), (N, R)))
        a |= {"A": _copy_into(A, case.factors), "B": _copy_into(B, case.factors), "scaling": case.scaling}
        a |= {"dropout": case.dropout, "training": case.training, "seed": 2**40 + 12345}
    return a


def quantized_weight(
    N: int,
    K: int,
    fmt: str = "nf4",
    group: int = 64,
    *,
    offsets: bool = False,
    order: bool = False,
    table: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    generator: torch.Generator | None = None,
) -> QuantizedWeight:
    """A weight [N, K] of random codes and scales, some of them zero, its tensors amid NaN and set bits.

    Args:
        fmt: "nf4", "fp4", "int4" or "int8".
        group: how many numbers of a row share a scale; 0 = all of them.
        offsets: with offsets, -scale · a zero point.
        order: with the columns in a random order.
        table: "random" values in place of the format's.
        dtype: what it is said to have been quantised from.
    """
    group = group or K
    size = N, -(-K // group)
    scales = (0.5 + torch.rand(size, generator=generator)) * _UNIT[fmt] / K**0.5
    scales.view(-1)[1::11] = 0
    shift, values = None, None
    if fmt == "int8":
        codes = torch.randint(-128, 128, (N, K), generator=generator).to(torch.int8)
    else:
        codes = torch.randint(0, 256, (N, (K + 1) // 2), generator=generator).to(torch.uint8)
        codes[:, K // 2 :] |= 15
        values = torch.tensor({"nf4": NF4, "fp4": FP4, "int4": INT4}[fmt])
        if table == "random":
            values = torch.randn(16, generator=generator)
        elif fmt == "int4" and not offsets:
            values -= 8
    if offsets:
        shift = -scales * torch.randint(0, 16, size, generator=generator)
    return QuantizedWeight(
        fmt, _amid(codes, -1 if fmt == "int8" else 255), _amid(scales), shape=(N, K), group_size=group, dtype=dtype,
        offsets=None if shift is None else _amid(shift), table=None if values is None else _amid(values),
        order=torch.randperm(K, generator=generator) if order else None,
    )  # fmt: skip


def _amid(t: Tensor, outside: float = math.nan) -> Tensor:
    """The values, contiguous, in a tensor with one more at either end."""
    return t.new_full((t.shape[0] + 2, *t.shape[1:]), outside)[1:-1].copy_(t)


def _packed(A: tuple[Tensor, ...], ranks: list[int]) -> Tensor:
    """Slices [L, R, K] as one [L, S * R, K] with those of each adapter one after the other at its live rank."""
    pool = torch.full((A[0].shape[0], sum(a.shape[1] for a in A), A[0].shape[2]), math.nan, dtype=A[0].dtype)
    for l, r in enumerate(ranks):
        pool[l, : len(A) * r] = torch.cat([a[l, :r] for a in A])
    return pool


def _unpacked(A: Factors, B: Factors, ranks: Tensor | None) -> Factors:
    """The slices of a packed A, filled with zeros; another A as it is."""
    if not isinstance(A, Tensor) or isinstance(B, Tensor):
        return A
    R = B[0].shape[-1]
    live = [R] * A.shape[0] if ranks is None else ranks.tolist()
    return tuple(
        torch.stack([F.pad(A[l, s * r : (s + 1) * r], (0, 0, 0, R - r)) for l, r in enumerate(live)])
        for s in range(len(B))
    )


def quantized_name(a: dict[str, Any]) -> str:
    """The public function whose arguments these are."""
    if "adapter_ids" in a:
        return "quantized_multi_lora_linear"
    return "quantized_lora_linear" if "A" in a else "quantized_linear"


def _spread(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """(value of its code, scale, offset) of each number, float64 [N, K], columns as the codes have them."""
    N, K = weight.shape
    if weight.table is None:
        value = weight.codes.double()
    else:
        halves = torch.empty(N, 2 * weight.codes.shape[1], dtype=torch.int64)
        halves[:, ::2], halves[:, 1::2] = weight.codes // 16, weight.codes % 16
        value = weight.table.double()[halves[:, :K]]

    def each(of_group: Tensor) -> Tensor:
        return of_group.double().repeat_interleave(weight.group_size, 1)[:, :K]

    return value, each(weight.scales), None if weight.offsets is None else each(weight.offsets)


def _in_order(W: Tensor, weight: QuantizedWeight) -> Tensor:
    if weight.order is None:
        return W
    out = torch.empty_like(W)
    out[:, weight.order] = W
    return out


def dequantize_oracle(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """W with a product and a sum rounded to fp32 each, and once to ``dtype``; exact, in float64, where that is None.

    What float64 makes of two fp32 numbers and rounds to fp32 is what one correctly rounded operation gives.
    """
    value, scale, offset = _spread(weight)
    if dtype is None:
        return _in_order(value * scale if offset is None else value * scale + offset, weight)
    W = (value * scale).float()
    if offset is not None:
        W = (W.double() + offset).float()
    return _in_order(W, weight).to(dtype)


def quantized_oracle(**a: Any) -> Tensor:
    """A function of the family in float64, differentiable: the truth a sample is held against."""
    return _formula(1, **_wide(a, 1))


def _wide(a: dict[str, Any], power: int) -> dict[str, Any]:
    """The arguments with what is multiplied in float64 and to a power; the weight as it is."""
    return a | {name: _raised(a[name], power) for name in ("x", "bias", "A", "B", "scaling", "weights") if name in a}


def _raised(value: Any, power: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_raised(entry, power) for entry in value)
    if isinstance(value, Tensor):
        return value.double() ** power
    return value if value is None else value**power


def _formula(
    power: int,
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    A: Any = None,
    B: Any = None,
    adapter_ids: Tensor | None = None,
    *,
    scaling: Any = None,
    ranks: Tensor | None = None,
    weights: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    seed: int = 0,
) -> Tensor:
    """The formula of arguments that were raised to ``power``: the sum of its terms each to that power."""
    y = x @ dequantize_oracle(weight).to(x.device).T ** power
    y = y if bias is None else y + bias
    if A is None:
        return y
    if adapter_ids is not None:
        A = _unpacked(A, B, ranks)
        return low_rank_oracle(y, x, A, B, adapter_ids, scaling=scaling, ranks=ranks, weights=weights)
    mask, keep = _mask(x, dropout, training, seed)
    return y + scaling * ((x * mask * keep**power) @ A.T) @ B.T


def quantized_plain(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    A: Any = None,
    B: Any = None,
    adapter_ids: Tensor | None = None,
    *,
    scaling: Any = None,
    ranks: Tensor | None = None,
    weights: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
    seed: int = 0,
) -> Tensor:
    """The same in plain PyTorch: the whole weight in x's dtype, F.linear, and the adapter as PEFT writes it."""
    W = dequantize_oracle(weight, x.dtype).to(x.device)
    y = F.linear(x, W, None if bias is None else bias.to(x.dtype))
    if A is None:
        return y
    if adapter_ids is not None:
        A = _unpacked(A, B, ranks)
        return low_rank_plain(y, x, A, B, adapter_ids, scaling=scaling, ranks=ranks, weights=weights)
    mask, keep = _mask(x, dropout, training, seed)
    kept = x.to(A.dtype)
    if training and dropout:
        kept = kept * mask * keep
    return (y + F.linear(F.linear(kept, A), B) * scaling).to(x.dtype)


def quantized_leaves(a: dict[str, Any]) -> dict[str, Tensor]:
    """The differentiable arguments by name, those of several A and B numbered."""
    leaves = {name: a[name] for name in ("x", "bias", "weights") if a.get(name) is not None}
    for name in ("A", "B"):
        value = a.get(name, ())
        leaves |= {name: value} if isinstance(value, Tensor) else {f"{name}[{i}]": t for i, t in enumerate(value)}
    return leaves


def quantized_gradients(function: Callable[..., Tensor], a: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    """y = function(**a) and the gradients of its differentiable arguments, by name: y, dx, dA, ..."""
    leaves = {name: t.requires_grad_() for name, t in quantized_leaves(a).items()}
    with torch.enable_grad():
        y = function(**a)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), materialize_grads=True)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def quantized_upstream(a: dict[str, Any]) -> Tensor:
    """A dy for the arguments of a call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*a["x"].shape[:-1], a["weight"].shape[0], generator=generator).to(a["x"].dtype)


@functools.cache
def quantized_expected(sample: Sample) -> dict[str, Expected]:
    """What the call of a sample must give, its value and its gradients by name.

    The squared call's results are the sums of the squared terms.
    """
    a = sample.make(0)
    dy = quantized_upstream(a)
    plain = quantized_gradients(quantized_plain, sample.make(0), dy)
    exact, squared = (
        quantized_gradients(functools.partial(_formula, power), _wide(sample.make(0), power), dy.double() ** power)
        for power in (1, 2)
    )
    length = max(a["x"].shape[-1], dy.shape[-1], dy.shape[:-1].numel())
    noise = {n: length**0.5 * 2**-24 * rms(t.sqrt()) for n, t in squared.items()}
    return {n: Expected(exact[n], plain[n], noise[n]) for n in exact}
