"""Samples, oracle and yardstick of the ``low_rank`` family."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import Sample, rms, threads

Factors = Tensor | Sequence[Tensor]


class Dtypes(NamedTuple):
    """The dtypes of one sample: of x, of A and B, of y."""

    x: torch.dtype
    factors: torch.dtype
    y: torch.dtype


#: Every combination the ops take, by name; "masters" are fp32 factors over a half-precision x.
LOW_RANK_DTYPES = {
    "fp32": Dtypes(torch.float32, torch.float32, torch.float32),
    "bf16": Dtypes(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": Dtypes(torch.float16, torch.float16, torch.float16),
    "bf16-masters": Dtypes(torch.bfloat16, torch.float32, torch.bfloat16),
    "fp16-masters": Dtypes(torch.float16, torch.float32, torch.float16),
    "bf16-y32": Dtypes(torch.bfloat16, torch.bfloat16, torch.float32),
    "fp16-y32": Dtypes(torch.float16, torch.float16, torch.float32),
    "bf16-masters-y32": Dtypes(torch.bfloat16, torch.float32, torch.float32),
}


@dataclass(frozen=True)
class _Case:
    """A sample before it has a dtype. ``rows`` are x's leading sizes, ``N`` the out features of each slice."""

    name: str
    rows: tuple[int, ...]
    K: int
    N: tuple[int, ...]
    R: int
    L: int
    ids: str = "mixed"
    ids_dtype: torch.dtype = torch.int64
    k: int = 0
    ranks: str | None = None
    scaling: float | str | None = None
    listed: tuple[int, ...] | None = None
    x: str = "dense"
    y: str = "dense"
    factors: str = "dense"
    nan_rows: bool = False
    traits: tuple[str, ...] = ()


_CASES = (
    _Case("no-rows", (0,), 64, (48,), 8, 2),
    _Case("no-rows-3d", (0, 5), 64, (48,), 8, 2),
    _Case("one-row", (1,), 576, (576,), 16, 1, "each"),
    _Case("one-row-of-nine", (1,), 63, (96,), 8, 9, "last"),
    _Case("all-ones", (1,), 1, (1,), 1, 1, "each"),
    _Case("one-in", (5,), 1, (63,), 3, 2),
    _Case("one-out", (5,), 63, (1,), 3, 2),
    _Case("odd", (7,), 7, (63,), 3, 3, scaling="adapter"),
    _Case("decode", (8,), 576, (1536,), 16, 8, "each", scaling=2.0),
    _Case("wide", (3,), 2500, (2111,), 8, 2),
    _Case("m17", (17,), 63, (1000,), 33, 3),
    _Case("m33", (33,), 1000, (63,), 17, 4),
    _Case("m65", (65,), 576, (192,), 64, 9, scaling="adapter"),
    _Case("m129", (129,), 192, (576,), 16, 2, "runs"),
    _Case("m300", (300,), 320, (257,), 8, 3, traits=("large",)),
    _Case("m300-one-adapter", (300,), 1536, (1000,), 16, 1, "last", traits=("large",)),
    _Case("r1", (33,), 320, (96,), 1, 5),
    _Case("r100", (17,), 200, (136,), 100, 3),
    _Case("r512", (9,), 320, (200,), 512, 2, traits=("large",)),
    _Case("no-adapter", (9,), 64, (48,), 8, 3, "none"),
    _Case("last-adapter-only", (19,), 96, (80,), 16, 9, "last"),
    _Case("two-of-nine", (21,), 96, (80,), 16, 9, "ends"),
    _Case("runs", (40,), 64, (64,), 8, 4, "runs", scaling=0.5),
    _Case("int32-ids", (11,), 64, (72,), 8, 3, ids_dtype=torch.int32),
    _Case("live-ranks", (29,), 100, (72,), 33, 5, "each", ranks="adapter", scaling="adapter"),
    _Case("no-live-rank", (6,), 40, (24,), 8, 2, "each", ranks="zero"),
    _Case("qkv", (13,), 192, (192, 64, 64), 16, 4, scaling="slice"),
    _Case("gate-up-live-ranks", (18,), 63, (96, 31), 17, 4, ranks="slice", scaling="slice"),
    _Case("qkv-shared-ranks", (18,), 96, (33, 64, 7), 16, 3, ranks="adapter", scaling="adapter"),
    _Case("listed", (23,), 100, (63,), 16, 4, listed=(4, 16, 7, 1), scaling="adapter"),
    _Case("listed-live-ranks", (23,), 64, (63,), 24, 3, listed=(24, 8, 9), ranks="adapter"),
    _Case("listed-one", (3,), 64, (40,), 8, 1, "each", listed=(8,)),
    _Case("factors-transposed", (14,), 63, (72,), 9, 3, factors="transposed"),
    _Case("factors-of-a-bank", (14,), 64, (72,), 16, 3, factors="columns", scaling="adapter"),
    _Case("listed-transposed", (14,), 63, (72,), 16, 3, listed=(16, 5, 8), factors="transposed"),
    _Case("x-columns", (12,), 96, (64,), 8, 3, x="columns"),
    _Case("x-rows", (12,), 63, (64,), 8, 3, x="rows"),
    _Case("x-transposed", (35,), 96, (64,), 8, 3, x="transposed"),
    _Case("x-expanded", (10,), 96, (64,), 8, 3, "each", x="expanded"),
    _Case("y-columns", (12,), 64, (50,), 8, 3, y="columns"),
    _Case("y-rows", (12,), 64, (63,), 8, 3, y="rows"),
    _Case("y-transposed", (20,), 64, (63,), 8, 3, y="transposed"),
    _Case("3d", (3, 5), 64, (48,), 8, 3),
    _Case("3d-blocks", (3, 7), 64, (48, 16), 8, 3, x="blocks", y="blocks"),
    _Case("3d-swapped", (5, 4), 63, (48,), 8, 3, x="swapped", y="dense"),
    _Case("3d-swapped-y", (5, 4), 64, (48,), 8, 3, x="dense", y="swapped"),
    _Case("4d", (2, 3, 4), 40, (24,), 4, 2, x="blocks"),
    _Case("strided", (4, 9), 63, (33, 50), 12, 4, ranks="slice", x="blocks", y="columns", factors="transposed"),
    _Case("mixture-of-2", (9,), 96, (63,), 8, 4, k=2, scaling="adapter"),
    _Case("mixture-of-3", (33,), 64, (40, 24), 16, 5, k=3, ranks="slice", scaling="slice"),
    _Case("mixture-of-1", (5,), 64, (40,), 8, 3, k=1),
    _Case("mixture-one-row", (1,), 200, (136,), 16, 4, k=4),
    _Case("mixture-no-rows", (0,), 64, (40,), 8, 3, k=2),
    _Case("mixture-3d", (2, 6), 64, (40,), 8, 3, k=2, x="blocks", y="columns", listed=(8, 4, 6)),
    _Case("mixture-m129", (129,), 96, (64,), 8, 3, k=2, traits=("large",)),
    _Case("nan-rows", (37,), 96, (63,), 16, 3, nan_rows=True),
)


def low_rank_samples(
    x: torch.dtype = torch.float32, factors: torch.dtype | None = None, y: torch.dtype | None = None
) -> list[Sample]:
    """The samples of bgmv, sgmv, their halves and multi_lora in the given dtypes (``*LOW_RANK_DTYPES[name]``).

    Each makes ``y, x, A, B, adapter_ids, scaling, ranks, weights``. What must not be read is NaN: factors past the
    live rank, factors of adapters without a row, rows of x without an adapter, what lies between the rows of a strided
    x. So is what must not be written: the rest of the tensor that y is a view of.

    Traits: ``mixture`` (ids [M, k] and weights), ``listed`` (factors in a list), ``strided``, ``nan`` (NaN in rows of x
    that have an adapter), ``large`` (slow for the oracle).

    Args:
        x: dtype of x.
        factors: dtype of A and B; x's where None.
        y: dtype of y; x's where None.
    """
    return _samples(Dtypes(x, factors or x, y or x))


@functools.cache
def _samples(dtypes: Dtypes) -> list[Sample]:
    samples = []
    for case in _CASES:
        traits = set(case.traits)
        traits |= {"mixture"} if case.k else set()
        traits |= {"listed"} if case.listed else set()
        traits |= {"nan"} if case.nan_rows else set()
        traits |= {"strided"} if {case.x, case.y, case.factors} != {"dense"} else set()
        samples.append(Sample(case.name, functools.partial(_make, case, dtypes), frozenset(traits)))
    return samples


def _make(case: _Case, dtypes: Dtypes, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    M, S, L = math.prod(case.rows), len(case.N), case.L
    weight_dtype = torch.float64 if dtypes.x == torch.float64 else torch.float32
    ids = _ids(case, M, generator)
    ranks = _live_ranks(case, generator)
    scaling: Any = case.scaling
    if isinstance(scaling, str):
        scaling = 0.25 + 2 * torch.rand((S, L) if scaling == "slice" else (L,), generator=generator)
    x = _laid_out((*case.rows, case.K), case.x, dtypes.x, generator)
    if case.x != "expanded":
        idle = (ids.reshape(M, max(case.k, 1)) == -1).all(1).reshape(case.rows)
        x[idle] = math.nan
        if case.nan_rows:
            x[1::7] = math.nan
    y = _laid_out((*case.rows, sum(case.N)), case.y, dtypes.y, generator)
    wide = case.listed or (case.R,) * L
    A, B = [], []
    for s, n in enumerate(case.N):
        a = [_laid_out((r, case.K), "dense", dtypes.factors, generator) / max(case.K, 1) ** 0.5 for r in wide]
        b = [_laid_out((n, r), "dense", dtypes.factors, generator) / r**0.5 for r in wide]
        for l in range(L):
            live = 0 if not bool((ids == l).any()) else _entry(ranks, s, l, wide[l])
            a[l][live:] = math.nan
            b[l][:, live:] = math.nan
        if case.listed:
            A, B = ([_copy_into(t, case.factors) for t in factors] for factors in (a, b))
        else:
            A.append(_copy_into(torch.stack(a), case.factors))
            B.append(_copy_into(torch.stack(b), case.factors))
    return {
        "y": y,
        "x": x,
        "A": A if case.listed else tuple(A) if S > 1 else A[0],
        "B": B if case.listed else tuple(B) if S > 1 else B[0],
        "adapter_ids": ids,
        "scaling": scaling,
        "ranks": ranks,
        "weights": 0.25 + torch.rand(M, case.k, generator=generator, dtype=weight_dtype) if case.k else None,
    }


def _ids(case: _Case, M: int, generator: torch.Generator) -> Tensor:
    size = M * max(case.k, 1)
    if case.ids == "mixed":
        ids = torch.randint(-1, case.L, (size,), generator=generator)
    elif case.ids == "each":
        ids = torch.arange(size) % case.L
    elif case.ids == "none":
        ids = torch.full((size,), -1)
    elif case.ids == "last":
        ids = torch.full((size,), case.L - 1)
    elif case.ids == "ends":
        ids = torch.randint(0, 2, (size,), generator=generator) * (case.L - 1)
    elif case.ids == "runs":  # of unequal lengths; an adapter comes back later
        ids = (torch.arange(size, dtype=torch.float64) / 3.7).sqrt().long() % (case.L + 1) - 1
    else:
        raise ValueError(f"no pattern of ids is called {case.ids!r}")
    return ids.to(case.ids_dtype).reshape((M, case.k) if case.k else (M,))


def _live_ranks(case: _Case, generator: torch.Generator) -> Tensor | None:
    if case.ranks is None:
        return None
    if case.ranks == "zero":
        return torch.zeros(case.L, dtype=torch.int32)
    size = (len(case.N), case.L) if case.ranks == "slice" else (case.L,)
    ranks = torch.randint(1, case.R + 1, size, generator=generator, dtype=torch.int32)
    ranks[..., 0] = 0
    ranks[..., -1] = case.R
    return ranks.minimum(torch.tensor(case.listed, dtype=torch.int32)) if case.listed else ranks


def _laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return _copy_into(values, layout)


def _copy_into(values: Tensor, layout: str) -> Tensor:
    """The values in a tensor of some strides, a view of a larger one that is NaN elsewhere."""
    if layout == "dense":
        return values
    *lead, rows, width = values.shape
    if layout == "expanded":
        return values[:1].expand(values.shape)
    if layout == "transposed":
        view = values.new_full((*lead, width, rows), math.nan).mT
    elif layout == "columns":
        view = values.new_full((*lead, rows, 2 * width + 3), math.nan)[..., 3 : 3 + width]
    elif layout == "rows":
        view = values.new_full((*lead, 2 * rows, width), math.nan)[..., ::2, :]
    elif layout == "blocks":  # leading sizes that no single stride describes
        view = values.new_full((*lead, rows + 2, width), math.nan)[..., 1 : rows + 1, :]
    elif layout == "swapped":
        view = values.new_full((rows, *lead, width), math.nan).movedim(0, -2)
    else:
        raise ValueError(f"no layout is called {layout!r}")
    return view.copy_(values)


def as_segments(adapter_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(seg_indptr, segment ids) of ids [M]: one segment a run, an empty one first, none for a last run of -1."""
    ids = adapter_ids.tolist()
    bounds, names = [0, 0], [0]
    for row, name in enumerate(ids):
        if row and ids[row - 1] == name:
            bounds[-1] += 1
        else:
            bounds.append(row + 1)
            names.append(name)
    if names[-1] == -1:
        bounds.pop()
        names.pop()
    return torch.tensor(bounds, dtype=adapter_ids.dtype), torch.tensor(names, dtype=adapter_ids.dtype)


def _entry(values: Any, s: int, l: int, default: Any) -> Any:
    """Entry (s, l) of a scalar, [L] or [S, L]."""
    if values is None or isinstance(values, (int, float)):
        return default if values is None else values
    return (values[l] if values.dim() == 1 else values[s, l]).item()


def _tuple(factors: Factors) -> tuple[Tensor, ...]:
    return (factors,) if isinstance(factors, Tensor) else tuple(factors)


def _slices(factors: Factors) -> list[list[Tensor]]:
    """The factors as matrices [slice][adapter], whichever form they come in."""
    parts = _tuple(factors)
    return [list(part.unbind(0)) for part in parts] if parts[0].dim() == 3 else [list(parts)]


def adapter_count(factors: Factors) -> int:
    """L of A or B in either form."""
    return len(_slices(factors)[0])


def _by_row(adapter_ids: Tensor) -> list[list[int]]:
    return (adapter_ids if adapter_ids.dim() == 2 else adapter_ids[:, None]).tolist()


@threads(1)  # row by row, threads only wait for one another
def shrink_oracle(x: Tensor, A: Factors, adapter_ids: Tensor, *, ranks: Tensor | None = None) -> Tensor:
    """v[s, p] = A x of pair p's row and adapter, one pair at a time: float64 [S, P, R], zero where nothing is live."""
    rows = x.double().reshape(-1, x.shape[-1]).unbind(0)
    factors = [[a.double() for a in part] for part in _slices(A)]
    R = max(a.shape[0] for a in factors[0])
    ids = _by_row(adapter_ids)
    v = []
    for s, part in enumerate(factors):
        live = [a[: _entry(ranks, s, l, a.shape[0])] for l, a in enumerate(part)]
        for m, row in enumerate(rows):
            for l in ids[m]:
                if l < 0:
                    v.append(x.new_zeros(R, dtype=torch.float64))
                else:
                    v.append(torch.cat([live[l] @ row, x.new_zeros(R - live[l].shape[0], dtype=torch.float64)]))
    return torch.stack(v).reshape(len(factors), -1, R) if v else x.new_zeros(len(factors), 0, R, dtype=torch.float64)


@threads(1)
def expand_oracle(
    y: Tensor,
    v: Tensor,
    B: Factors,
    adapter_ids: Tensor,
    *,
    scaling: float | Tensor | None = None,
    ranks: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """y[m] + Σⱼ w[m, j] s B v of row m's adapters in float64, one pair at a time; y is left alone."""
    out = y.double().reshape(-1, y.shape[-1]).unbind(0)
    if not out:
        return y.double()
    ids = _by_row(adapter_ids)
    columns: list[list[Tensor]] = [[] for _ in out]
    for s, part in enumerate(_slices(B)):
        live = [b.double()[:, : _entry(ranks, s, l, b.shape[1])] for l, b in enumerate(part)]
        for m in range(len(out)):
            total = out[m].new_zeros(part[0].shape[0])
            for j, l in enumerate(ids[m]):
                if l >= 0:
                    term = live[l] @ v[s, m * len(ids[m]) + j, : live[l].shape[1]].double()
                    weight = 1.0 if weights is None else weights[m, j].double()
                    total = total + term * (_entry(scaling, s, l, 1.0) * weight)
            columns[m].append(total)
    return torch.stack([a + torch.cat(b) for a, b in zip(out, columns, strict=True)]).reshape(y.shape)


def low_rank_oracle(
    y: Tensor,
    x: Tensor,
    A: Factors,
    B: Factors,
    adapter_ids: Tensor,
    *,
    scaling: float | Tensor | None = None,
    ranks: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """y[m] + Σⱼ w[m, j] s B (A x[m]) in float64, one row and adapter at a time: the truth a sample is held against.

    Differentiable in y, x, A, B and weights.

    Returns:
        float64, y's shape; y is left alone.
    """
    v = shrink_oracle(x, A, adapter_ids, ranks=ranks)
    return expand_oracle(y, v, B, adapter_ids, scaling=scaling, ranks=ranks, weights=weights)


def low_rank_terms(
    y: Tensor,
    x: Tensor,
    A: Factors,
    B: Factors,
    adapter_ids: Tensor,
    *,
    scaling: float | Tensor | None = None,
    ranks: Tensor | None = None,
    weights: Tensor | None = None,
) -> float:
    """RMS over the outputs of √Σ t² over the terms t = y, w s B x A summed into each, NaN ones left out.

    √K · 2⁻²⁴ times this is the rounding noise of a float32 sum.
    """
    squared = low_rank_oracle(
        y.double() ** 2,
        x.double() ** 2,
        [a.double() ** 2 for a in _tuple(A)],
        [b.double() ** 2 for b in _tuple(B)],
        adapter_ids,
        scaling=scaling**2 if scaling is not None else None,
        ranks=ranks,
        weights=weights**2 if weights is not None else None,
    )
    return rms(squared[squared.isfinite()].sqrt())


def low_rank_plain(
    y: Tensor,
    x: Tensor,
    A: Factors,
    B: Factors,
    adapter_ids: Tensor,
    *,
    scaling: float | Tensor | None = None,
    ranks: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """y + delta the way one writes it in plain PyTorch: F.linear twice for each adapter, every step in its dtype.

    fp32 factors over a half-precision x work as in PEFT: x is cast to fp32 and the sum back to y's dtype.
    Differentiable in y, x, A, B and weights.

    Returns:
        y's shape and dtype; y is left alone.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = y.reshape(-1, y.shape[-1]).clone()
    ids = adapter_ids if adapter_ids.dim() == 2 else adapter_ids[:, None]
    start = 0
    for s, (part_a, part_b) in enumerate(zip(_slices(A), _slices(B), strict=True)):
        width = part_b[0].shape[0]
        for l, (a, b) in enumerate(zip(part_a, part_b, strict=True)):
            r = _entry(ranks, s, l, a.shape[0])
            for j in range(ids.shape[1]):
                (m,) = (ids[:, j] == l).nonzero(as_tuple=True)
                if not r or not m.numel():
                    continue
                delta = F.linear(F.linear(rows[m].to(a.dtype), a[:r]), b[:, :r]) * _entry(scaling, s, l, 1.0)
                if weights is not None:
                    delta = delta * weights[m, j, None].to(delta.dtype)
                columns = torch.arange(start, start + width)
                out[m[:, None], columns] = (out[m[:, None], columns] + delta).to(out.dtype)
        start += width
    return out.reshape(y.shape)
