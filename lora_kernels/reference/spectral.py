"""``spectral`` in plain PyTorch: y = x ΔWᵀ with ΔW = s T₂ᵀ S T₁, S sparse, without ΔW.

Every function takes any floating dtype on any device and accumulates in fp32 (fp64 for fp64). x is [..., K], y
[..., N], M rows in all; ΔW is [N, K]. A kind says what T₁ and T₂ are, each along one row, and what s is:

==========  =======================================================  ==================  ===========
kind        T₁ and T₂                                                lengths             s
==========  =======================================================  ==================  ===========
fourier     ``trigonometric``'s fourier                              K, N                scale / (N K)
dct         ``trigonometric``'s cosine, orthonormal                  K, N                scale
hartley     ``trigonometric``'s hartley                              K, N                scale / √(N K)
identity    none                                                     K, N                scale
wht         T₁: ``hadamard`` of entries ±1 / √K; T₂: none            K, N                scale
haar        ``haar`` of one level, of the row and a 0 where it is    K and N, each made  scale
            odd                                                      even
==========  =======================================================  ==================  ===========

S holds entries at (row, column), each a coefficient, or its negative: values [n] are what is trained, and an entry is
told by the index of its coefficient, i, or by -i - 1 for its negative. ``by_row`` is int32 [rows of S + 1 + 2e]: for
each row of S where its entries begin, and where the last ones end; then the columns of the e entries, ascending in each
row; then their coefficients. ``by_column`` is the same of Sᵀ. Entries at one place add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import transforms
from .low_rank import accumulate_dtype, rows_of

KINDS = ("fourier", "dct", "hartley", "identity", "wht", "haar")


def length_of(kind: str, length: int) -> int:
    """The length of a transformed row of x or y of a length."""
    return length + length % 2 if kind == "haar" else length


def factor_of(kind: str, N: int, K: int) -> float:
    """s / scale."""
    return {"fourier": 1 / max(N * K, 1), "hartley": 1 / math.sqrt(max(N * K, 1))}.get(kind, 1.0)


class Entries(NamedTuple):
    """``by_row`` taken apart: [rows + 1], [e], [e]; and each entry's row, [e]."""

    starts: Tensor
    columns: Tensor
    coefficients: Tensor
    rows: Tensor

    @classmethod
    def of(cls, by_row: Tensor, rows: int) -> Entries:
        """Of ``by_row`` or ``by_column``, and how many rows it is of."""
        count = (by_row.shape[0] - rows - 1) // 2
        starts, columns, coefficients = by_row.split((rows + 1, count, count))
        each = torch.arange(rows, device=by_row.device).repeat_interleave(starts.diff(), output_size=count)
        return cls(starts, columns.long(), coefficients, each)

    def weights(self, values: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        """What stands in s S at each entry."""
        c = self.coefficients
        w = values.to(dtype)[torch.where(c < 0, ~c, c).long()] * scale
        return torch.where(c < 0, -w, w)


class Transforms:
    """T₁ and T₂ of a kind along the rows of a matrix; ``of`` has the transforms, this module's or the ops."""

    def __init__(self, kind: str, signs: Tensor | None = None, orders: Sequence[int] = (), of: Any = transforms):
        self.kind, self.signs, self.orders, self.of = kind, signs, orders, of

    def of_x(self, x: Tensor, transpose: bool = False) -> Tensor:
        """T₁ x or T₁ᵀ x for each row."""
        if self.kind == "wht" and x.shape[-1]:
            return self.of.hadamard(x, self.signs, self.orders, x.shape[-1] ** -0.5, transpose)
        return self.of_y(x, transpose)

    def of_y(self, y: Tensor, transpose: bool = False) -> Tensor:
        """T₂ y or T₂ᵀ y for each row."""
        N = y.shape[-1]
        if not N or self.kind in ("identity", "wht"):
            return y
        if self.kind == "haar":
            return self.of.haar(y if transpose else torch.nn.functional.pad(y, (0, N % 2)), 1, transpose)
        if self.kind == "dct":
            return self.of.trigonometric(y, "cosine", N**-0.5, (2 / N) ** 0.5, transpose)
        return self.of.trigonometric(y, self.kind, 1.0, 1.0, transpose)


def spectral_linear(
    x: Tensor,
    values: Tensor,
    by_row: Tensor,
    y: Tensor | None,
    signs: Tensor | None,
    orders: Sequence[int],
    kind: str,
    out_features: int,
    scale: float,
) -> Tensor:
    """(y or 0) + x ΔWᵀ.

    Args:
        x: [..., K].
        values: [n].
        by_row: S.
        y: [..., N] in any floating dtype, or None.
        signs, orders: of the Hadamard matrix of order K, where kind is ``wht``.
        kind: which transforms.
        out_features: N.
        scale: what the kind's own factor is multiplied by.

    Returns:
        [..., N] in y's dtype, or x's without one; rounded once.
    """
    dtype, N = accumulate_dtype(x.dtype), out_features
    T = Transforms(kind, signs, orders)
    u = T.of_x(rows_of(x).to(dtype))
    entries = Entries.of(by_row, length_of(kind, N))
    w = entries.weights(values, scale * factor_of(kind, N, x.shape[-1]), dtype)
    v = u.new_zeros(entries.starts.shape[0] - 1, u.shape[0])
    for some in _few_at_once(w.shape[0], u.shape[0]):
        v.index_add_(0, entries.rows[some], u[:, entries.columns[some]].T * w[some, None])
    delta = T.of_y(v.T, transpose=True)[:, :N].reshape(*x.shape[:-1], N)
    return delta.to(x.dtype).contiguous() if y is None else (y + delta).to(y.dtype).contiguous()


def spectral_add_(
    y: Tensor,
    x: Tensor,
    values: Tensor,
    by_row: Tensor,
    ids: Tensor,
    scaling: Tensor | None,
    signs: Tensor | None,
    orders: Sequence[int],
    kind: str,
    scale: float,
) -> None:
    """y += x ΔW_lᵀ for each row, l its adapter: spectra with values of their own at the same places.

    Args:
        y: [..., N], any floating dtype.
        x: [..., K].
        values: [L, n].
        by_row: S.
        ids: int32 or int64 [M], which values a row has; -1: none, and y's row stays as it is.
        scaling: fp32 [L], what besides scale ΔW_l is multiplied by, or None.
        The others: as :func:`spectral_linear` takes them.
    """
    add_by_adapter(Transforms(kind, signs, orders), y, x, values, by_row, ids, scaling, scale)


def add_by_adapter(
    T: Transforms,
    y: Tensor,
    x: Tensor,
    values: Tensor,
    by_row: Tensor,
    ids: Tensor,
    scaling: Tensor | None,
    scale: float,
) -> None:
    """:func:`spectral_add_` by any transforms."""
    dtype, N = accumulate_dtype(x.dtype), y.shape[-1]
    entries = Entries.of(by_row, length_of(T.kind, N))
    u = T.of_x(rows_of(x).to(dtype))
    if not values.shape[0]:
        return
    ids = ids.long()
    of_row = ids.clamp(min=0)
    v = u.new_zeros(entries.starts.shape[0] - 1, u.shape[0])
    c = entries.coefficients
    signs_of_entries = torch.where(c < 0, -1.0, 1.0).to(dtype)
    index = torch.where(c < 0, ~c, c).long()
    for some in _few_at_once(index.shape[0], u.shape[0]):
        w = values.to(dtype)[:, index[some]][of_row] * signs_of_entries[some]
        v.index_add_(0, entries.rows[some], (u[:, entries.columns[some]] * w).T)
    each = u.new_full((values.shape[0],), scale * factor_of(T.kind, N, x.shape[-1]))
    each = (each if scaling is None else each * scaling)[of_row, None]
    delta = (T.of_y(v.T, transpose=True)[:, :N] * each).reshape(y.shape)
    chosen = (ids >= 0).reshape(*y.shape[:-1], 1)
    y.copy_(torch.where(chosen, y + delta, y).to(y.dtype))


def spectral_linear_grads(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    signs: Tensor | None,
    orders: Sequence[int],
    kind: str,
    scale: float,
    needs_dx: bool,
    needs_dvalues: bool,
) -> tuple[Tensor, Tensor]:
    """dx = dy ΔW and dvalues_i = ∂(Σ dy · x ΔWᵀ) / ∂values_i.

    Args:
        dy: [..., N].
        x: [..., K].
        by_row, by_column: S and Sᵀ.
        needs_dx, needs_dvalues: what is asked for; the other one is [0].
        The others: as :func:`spectral_linear` takes them.

    Returns:
        dx [..., K] in x's dtype, and dvalues fp32 [n] (fp64 for fp64).
    """
    dtype, N, K = accumulate_dtype(x.dtype), dy.shape[-1], x.shape[-1]
    T = Transforms(kind, signs, orders)
    g = T.of_y(rows_of(dy).to(dtype))
    s = scale * factor_of(kind, N, K)
    dx, dvalues = x.new_empty(0), g.new_empty(0)
    if needs_dvalues:
        u = T.of_x(rows_of(x).to(dtype))
        entries = Entries.of(by_row, length_of(kind, N))
        products = g.new_empty(entries.rows.shape[0])
        for some in _few_at_once(products.shape[0], g.shape[0]):
            products[some] = (g[:, entries.rows[some]] * u[:, entries.columns[some]]).sum(0)
        dvalues = _to_coefficients(products, entries, values.shape[0], s)
    if needs_dx:
        entries = Entries.of(by_column, length_of(kind, K))
        w = entries.weights(values, s, dtype)
        z = g.new_zeros(entries.starts.shape[0] - 1, g.shape[0])
        for some in _few_at_once(w.shape[0], g.shape[0]):
            z.index_add_(0, entries.rows[some], g[:, entries.columns[some]].T * w[some, None])
        dx = T.of_x(z.T, transpose=True)[:, :K].reshape(x.shape).to(x.dtype).contiguous()
    return dx, dvalues


def _to_coefficients(products: Tensor, entries: Entries, count: int, scale: float) -> Tensor:
    """The sums of the entries' gradients for each of ``count`` coefficients, by their signs."""
    c = entries.coefficients
    signed = torch.where(c < 0, -products, products) * scale
    return products.new_zeros(count).index_add_(0, torch.where(c < 0, ~c, c).long(), signed)


def _few_at_once(count: int, rows: int) -> list[slice]:
    """Slices of ``count`` entries, each short enough for as many products a row to be held."""
    step = max((1 << 22) // max(rows, 1), 1)
    return [slice(i, i + step) for i in range(0, count, step)]


def spectral_delta_weight(
    values: Tensor,
    by_row: Tensor,
    signs: Tensor | None,
    orders: Sequence[int],
    kind: str,
    out_features: int,
    in_features: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """ΔW, [N, K] in ``dtype``, rounded once.

    Args: as :func:`spectral_linear` takes them; K is ``in_features``.
    """
    return delta_weight(
        Transforms(kind, signs, orders), values, by_row, out_features, in_features, scale, accumulate_dtype(dtype)
    ).to(dtype)


def delta_weight(T: Transforms, values: Tensor, by_row: Tensor, N: int, K: int, scale: float, dtype: torch.dtype):
    """ΔW in a dtype to sum in, by any transforms."""
    rows, columns = length_of(T.kind, N), length_of(T.kind, K)
    entries = Entries.of(by_row, rows)
    S = torch.zeros(rows * columns, dtype=dtype, device=values.device)
    w = entries.weights(values, scale * factor_of(T.kind, N, K), dtype)
    S.index_add_(0, entries.rows * columns + entries.columns, w)
    W = T.of_x(S.view(rows, columns), transpose=True)[:, :K]
    return T.of_y(W.mT, transpose=True)[:, :N].mT.contiguous()


def spectral_weight_grad(
    dweight: Tensor,
    by_row: Tensor,
    signs: Tensor | None,
    orders: Sequence[int],
    kind: str,
    count: int,
    scale: float,
) -> Tensor:
    """The gradient of the ``count`` values, fp32 (fp64 for fp64), from dweight [N, K], that of ΔW."""
    return weight_grad(Transforms(kind, signs, orders), dweight, by_row, count, scale)


def weight_grad(T: Transforms, dweight: Tensor, by_row: Tensor, count: int, scale: float) -> Tensor:
    """:func:`spectral_weight_grad` by any transforms."""
    N, K = dweight.shape
    G = T.of_x(dweight.to(accumulate_dtype(dweight.dtype)))
    G = T.of_y(G.mT).mT
    entries = Entries.of(by_row, G.shape[0])
    return _to_coefficients(G[entries.rows, entries.columns], entries, count, scale * factor_of(T.kind, N, K))
