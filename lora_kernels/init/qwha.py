"""QWHA's initialisation: a sparse Walsh-Hadamard spectrum that makes up for what quantisation took from a weight.

Source: QWHA (arXiv 2509.17428), its equations 7 (AdaAlloc), 8 and 9 (value refinement).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops import _check
from ..ops.transforms import wht
from ..reference.hadamard import orders_of
from ..spectral_plan import SpectralPlan
from ._gathered import Gathered, alike


@dataclass(frozen=True)
class QWHAReport:
    """What an initialisation reached.

    Attributes:
        before: ‖(residual - ΔW) R‖ / ‖residual R‖ with the selected coefficients as they are in the residual's own
            spectrum, R Rᵀ being the Gram matrix with its damping.
        after: the same with the refined ones.
        counts: int64 [N], how many coefficients each row has.
        lifted: rows whose system was not positive definite as it came, and was damped more.
    """

    before: float
    after: float
    counts: Tensor
    lifted: int = 0


@dataclass(frozen=True)
class QWHAInit:
    """ΔW = scale · K(S) of kind "wht", ready for :func:`lora_kernels.spectral_linear`.

    Attributes:
        plan: where the coefficients stand, row by row, columns ascending.
        values: [n], float32 (float64 where residual or gram is).
        report: what was reached.
    """

    plan: SpectralPlan
    values: Tensor
    report: QWHAReport


@torch.no_grad()
def qwha_init(
    residual: Tensor,
    n: int,
    *,
    gram: Tensor | None = None,
    t: float = 1.0,
    layout: Literal["auto", "quarot"] = "auto",
    scale: float = 1.0,
    damping: float = 1e-4,
) -> QWHAInit:
    """The spectrum of n coefficients with which ΔW = scale · S H comes close to a residual, as seen by a layer's input.

    With H = ±1/√K, x₀ = residual Hᵀ and G = H (gram + damping · mean(diag gram) · I) Hᵀ = (H R)(H R)ᵀ:

    1. Row i gets p_i coefficients, see :func:`ada_alloc`, by the norm ‖residual_i R‖.
    2. They stand at the p_i largest of ‖(H R)_j‖² x₀[i, j]².
    3. Their values v minimise ‖(residual_i - scale · v H[selected]) R‖: scale · G[sel, sel] v = (G x₀_i)[sel].

    The systems of rows with about as many coefficients are solved together, by Cholesky's factors of matrices gathered
    from the one G. No row ends further from its residual than with the coefficients of x₀ themselves, with the damping
    or without.

    Args:
        residual: [N, K], W - Q(W), what ΔW is to make up for; fp32, bf16, fp16 or fp64.
        n: how many coefficients, from 1 to N K; QWHA takes r (N + K) for LoRA's number of parameters at rank r.
        gram: XᵀX [K, K] of the layer's inputs X, a token a row, in any of these dtypes; None: the identity, for which
            the values are x₀'s own.
        t: AdaAlloc's exponent, 0 or more; 0 gives every row as many.
        layout: which Hadamard matrix, as :func:`lora_kernels.wht` takes it.
        scale: what ΔW is multiplied by, α / √(N K) for :class:`lora_kernels.nn.QWHALinear`.
        damping: of the Gram matrix, in units of the mean of its diagonal.

    Returns:
        The plan, the values and a report; the same for the same arguments.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: one of the wrong shape, on another device or out of range; NaN or infinite numbers; a gram that is
            zero, not symmetric or not positive semi-definite; no Hadamard matrix of order K is constructed here.

    It computes in float32, or float64 where residual or gram is; memory beyond the arguments is some [N, K] and [K, K].

    Source: QWHA (arXiv 2509.17428), equations 7 to 9.
    """
    _check_arguments(residual, n, gram, t, layout, scale, damping)
    N, K = residual.shape
    given = (residual,) if gram is None else (residual, gram)
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in given) else torch.float32
    x0 = torch.nn.functional.pad(wht(residual.to(dtype), layout=layout), (0, 1))  # a last one, for places that are none
    G = None if gram is None else _spectral_gram(gram.to(dtype), layout, damping)
    systems, weights = (None, None) if G is None else (Gathered(G, K), G.diagonal()[:K])
    energy = (x0 * (x0 if G is None else x0 @ G)).sum(1, dtype=torch.float64).clamp_(min=0)
    counts = ada_alloc(energy.sqrt(), n, K, t)

    columns, coefficients, order, lifted = [], [], [], 0
    before, gained = energy.new_zeros(()), energy.new_zeros(())
    for some, most in alike(counts):
        own = torch.arange(most, device=x0.device) < counts[some, None]  # [rows, most]
        rest = x0[some]
        score = rest[:, :K].square()
        score = score if weights is None else score * weights
        selected = score.topk(most).indices.masked_fill_(~own, K).sort(1).values
        x = rest.gather(1, selected)
        rest.scatter_(1, selected, 0.0)
        r = rest if G is None else rest @ G
        before += (rest * r).sum(dtype=torch.float64)
        if systems is not None:
            r = r.gather(1, selected)
            delta, more = systems.solve(selected, r)
            gained += (delta * r).sum(dtype=torch.float64)
            lifted += more
            x += delta
        columns.append(selected[own])
        coefficients.append(x[own])
        order.append(some)

    rows, cols, values = _by_row(torch.cat(order), counts, torch.cat(columns), torch.cat(coefficients))
    whole = float(energy.sum())
    errors = [math.sqrt(max(float(e), 0.0) / whole) if whole else 0.0 for e in (before, before - gained)]
    plan = SpectralPlan(rows, cols, shape=(N, K), layout=layout)
    return QWHAInit(plan, values / scale, QWHAReport(errors[0], errors[1], counts, lifted))


def ada_alloc(norms: Tensor, n: int, most: int, t: float = 1.0) -> Tensor:
    """p_i = floor(n · norms_i^t / Σ norms^t): how many of n coefficients each row gets, int64 [N], n in all.

    No row gets more than ``most``. What the floors and the bound leave is spread evenly over the rows below it, and
    what is left then goes one by one to those with the fewest, the first ones first.

    Args:
        norms: [N], 0 or more.
        n: from 0 to N · most.
        most: K.
        t: 0 gives every row as many; so do norms that are all zero.

    Raises:
        ValueError: n is out of range.

    Source: QWHA (arXiv 2509.17428), equation 7.
    """
    if not 0 <= n <= most * len(norms):
        raise ValueError(f"n must be from 0 to {most * len(norms)} for {len(norms)} rows of at most {most}, got {n}")
    share = (norms.double() / norms.max().clamp(min=torch.finfo(norms.dtype).tiny)) ** t
    total = share.sum()
    share = share / total if total > 0 else torch.full_like(share, 1 / len(share))
    counts = (n * share).floor_().long().clamp_(max=most)
    while left := n - int(counts.sum()):
        below = counts < most
        even = left // int(below.sum())
        if even:
            counts = (counts + even * below).clamp_(max=most)
        else:
            fewest = counts.masked_fill(~below, most + 1).argsort(stable=True)[:left]
            counts[fewest] += 1
    return counts


def _spectral_gram(gram: Tensor, layout: Any, damping: float) -> Tensor:
    """H gram Hᵀ over the mean of gram's diagonal, damped, and one row and column more, of zeros."""
    K = gram.shape[0]
    both = wht(wht(gram, layout=layout).mT, layout=layout)
    G = gram.new_zeros(K + 1, K + 1)
    torch.add(both, both.mT, out=G[:K, :K])  # symmetric to the last bit, and half the rounding's variance
    G *= 0.5 / gram.diagonal().mean()
    G.diagonal()[:K] += damping
    return G


def _by_row(order: Tensor, counts: Tensor, cols: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, cols, values) row by row, of what stands there for the rows in an order."""
    n, each = cols.shape[0], counts[order]
    apart = (counts.cumsum(0) - counts)[order] - (each.cumsum(0) - each)
    at = torch.arange(n, device=cols.device) + apart.repeat_interleave(each, output_size=n)
    rows = torch.arange(counts.shape[0], device=cols.device).repeat_interleave(counts, output_size=n)
    return rows, torch.empty_like(cols).index_copy_(0, at, cols), torch.empty_like(values).index_copy_(0, at, values)


def _check_arguments(residual: Any, n: Any, gram: Any, t: Any, layout: Any, scale: Any, damping: Any) -> None:
    _check.floating("residual", residual)
    if residual.dim() != 2 or not residual.numel():
        raise ValueError(f"residual must be [N, K], got {_check.shape(residual)}")
    N, K = residual.shape
    if type(n) is not int:
        raise TypeError(f"n must be an int, got {type(n).__name__}")
    if not 1 <= n <= N * K:
        raise ValueError(f"n must be from 1 to {N * K} for a residual {_check.shape(residual)}, got {n}")
    for name, value in (("t", t), ("damping", damping), ("scale", scale)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not math.isfinite(value) or (value == 0 if name == "scale" else value < 0):
            raise ValueError(f"{name} must be finite and {'not 0' if name == 'scale' else '0 or more'}, got {value!r}")
    if layout not in ("auto", "quarot"):
        raise ValueError(f"layout must be 'auto' or 'quarot', got {layout!r}")
    orders_of(K, layout)
    _check_finite("residual", residual)
    if gram is None:
        return
    _check.floating("gram", gram)
    if gram.shape != (K, K):
        raise ValueError(f"gram must be {[K, K]} for a residual {_check.shape(residual)}, got {_check.shape(gram)}")
    if gram.device != residual.device:
        raise ValueError(f"gram is on {gram.device}, residual on {residual.device}")
    _check_finite("gram", gram)
    diagonal = gram.diagonal()
    if (diagonal < 0).any():
        at = int((diagonal < 0).nonzero()[0])
        raise ValueError(f"gram must be positive semi-definite, but gram[{at}, {at}] is {float(diagonal[at]):g}")
    if not diagonal.any():
        raise ValueError("gram is zero: the layer has seen no input; gram=None takes all directions as alike")
    low, high = (gram - gram.mT).aminmax()
    apart = torch.maximum(high, -low) / diagonal.max()
    if apart > max(1e-3, 4 * torch.finfo(gram.dtype).eps):
        raise ValueError(
            f"gram must be symmetric, but differs from its transpose by {float(apart):.1e} of its diagonal's largest"
        )


def _check_finite(name: str, value: Tensor) -> None:
    if not all(bound.isfinite() for bound in value.aminmax()):
        at = (~value.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name} must hold finite numbers, but {name}{at} is {float(value[tuple(at)])}")
