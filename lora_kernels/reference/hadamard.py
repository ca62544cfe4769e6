"""Hadamard matrices: which orders can be constructed, and the cheapest Kronecker product for a length.

A Hadamard matrix of order N has entries ±1 and H Hᵀ = N I. Here one is H = H₁ ⊗ H₂ ⊗ ... ⊗ H_{2^m}: bases of orders
that are no power of two, one fixed matrix an order, and Sylvester's matrix last. A base is the first that exists of

* Paley's first construction for a prime q = K - 1 of the form 4n + 3, and his second for a prime q = K / 2 - 1 of the
  form 4n + 1 (Paley, On orthogonal matrices, 1933);
* four circulant blocks in Williamson's array, or, where they are not symmetric, in Goethals and Seidel's, from the
  first rows below (Williamson 1944; Baumert, Golomb and Hall 1962; Kharaghani and Tayfeh-Rezaie 2005 for order 428);
* Paley's constructions for a power of a prime.

QuaRot's tables are these matrices: 12, 20, 60, 108 and 140 are Paley's first, 28 and 36 his second, 52, 156 and 172
Williamson's, and 40 is H₂ ⊗ H₂₀.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

#: The largest base that is constructed.
LARGEST = 2048

#: First rows of the circulants A, B, C, D of order n for a matrix of order 4n: bit j is set where entry j is -1.
_CIRCULANTS = {
    13: (0x161A, 0x1C0E, 0xB34, 0x1EDE),
    23: (0x117E88, 0x1CA538, 0x498192, 0x3BA5DC),
    29: (0xDA2116C, 0x25C0E90, 0x17340B3A, 0x735EB38),
    39: (0x1AFB3CDF58, 0xECF5AF370, 0x1975BDAE98, 0x72BE247D4E),
    43: (0x730A26450CE, 0x207AC935E04, 0x14D42F42B28, 0x385B3FCDA1C),
    47: (0x3B03D70E7B7A, 0x3B03D7718485, 0x368FBB9A456E, 0x368FBBE5BA91),
    59: (0x610DCBA17433420, 0x4BA761097433421, 0x610DCBA28BCCBDF, 0x34589EF57433421),
    107: (
        0x5E121F53C21158B3E8768C88682,
        0x4E10CDAC121158B3E889737797D,
        0x5E121F53C5EEA74C1789737797D,
        0x31EF3253EA1158B3E889737797D,
    ),
}

#: QuaRot's base for the odd part of a length; order 40 is written as 2 and 20.
_QUAROT = {n: (4 * n,) for n in (3, 7, 9, 13, 15, 27, 35, 39, 43)} | {1: (), 5: (2, 20)}


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Made once, whatever inference mode, fake tensors or default device are on where it is asked for first."""

    @functools.cache
    @functools.wraps(make)
    def kept(*args):
        with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
            return make(*args)

    return kept


@_kept
def base(order: int) -> Tensor:
    """The package's Hadamard matrix of a base's order, int8 [order, order].

    Raises:
        ValueError: none of the constructions has that order.
    """
    if order == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    kind, q = _construction(order)
    if kind == 1:
        H = torch.ones(order, order, dtype=torch.int8)
        H[0, 1:] = -1
        H[1:, 1:] = _quadratic_character(q) + torch.eye(q, dtype=torch.int8)
        return H
    if kind == 2:
        C, eye = torch.ones(q + 1, q + 1, dtype=torch.int8), torch.eye(q + 1, dtype=torch.int8)
        C[0, 0] = 0
        C[1:, 1:] = _quadratic_character(q)
        return torch.cat([torch.cat([C + eye, C - eye], 1), torch.cat([C - eye, -C - eye], 1)])
    return _four_circulants(order // 4)


def is_base(order: int) -> bool:
    """Whether a matrix of that order can be constructed that is no Kronecker product."""
    return order == 2 or _construction(order) != (0, 0)


@functools.cache
def _construction(order: int) -> tuple[int, int]:
    """(1 or 2, q) for Paley's, (4, 0) for four circulants, (0, 0) for none."""
    if order % 4 or order > LARGEST:
        return 0, 0
    first, second = order - 1, order // 2 - 1
    paley = [(1, first)] if first % 4 == 3 else []
    paley += [(2, second)] if second % 4 == 1 else []
    for kind, q in paley:
        if _prime_of(q) == q:
            return kind, q
    if order // 4 in _CIRCULANTS:
        return 4, 0
    for kind, q in paley:
        if _prime_of(q):
            return kind, q
    return 0, 0


def _prime_of(q: int) -> int:
    """p where q is a power of the prime p, 0 where it is none."""
    if q < 2:
        return 0
    p = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    while q % p == 0:
        q //= p
    return p if q == 1 else 0


def _quadratic_character(q: int) -> Tensor:
    """χ(a - b) for the elements a, b of the field of q elements: 1 for a square, -1 for another, 0 for zero; int8."""
    p = _prime_of(q)
    chi = torch.full((q,), -1, dtype=torch.int8)
    chi[0] = 0
    if p == q:
        chi[torch.arange(1, q, dtype=torch.int64) ** 2 % q] = 1
        element = torch.arange(q)
        return chi[(element[:, None] - element) % q]
    powers = _powers_of_a_generator(p, q)
    chi[powers[::2]] = 1
    digits = torch.arange(q)[:, None] // p ** torch.arange(round(math.log(q, p))) % p  # of an element, [q, k]
    difference = (digits[:, None] - digits[None]) % p
    return chi[(difference * p ** torch.arange(digits.shape[1])).sum(-1)]


def _powers_of_a_generator(p: int, q: int) -> list[int]:
    """1, x, x², ... of the field of q = p^k elements: polynomials modulo p, written as numbers in base p.

    The modulus x^k - c(x) is the first under which the powers of x are all the elements but zero.
    """
    k = round(math.log(q, p))
    for code in range(1, q):
        c = [code // p**i % p for i in range(k)]
        powers, value = [], [1] + [0] * (k - 1)
        for _ in range(q - 1):
            powers.append(sum(v * p**i for i, v in enumerate(value)))
            top = value[-1]
            value = [(v + top * w) % p for v, w in zip([0, *value[:-1]], c, strict=True)]
        if len(set(powers)) == q - 1 and 0 not in powers:
            return powers
    raise AssertionError(f"no primitive polynomial for {q}")


def _four_circulants(n: int) -> Tensor:
    """Williamson's array of the four circulants of order n; with R, which reverses columns, where they are not
    symmetric (Goethals and Seidel's array)."""
    turn = (torch.arange(n)[None] - torch.arange(n)[:, None]) % n
    A, B, C, D = (torch.tensor([1 - 2 * (row >> j & 1) for j in range(n)])[turn] for row in _CIRCULANTS[n])
    if all(torch.equal(X, X.T) for X in (A, B, C, D)):
        b, c, d = B, C, D
    else:
        B, C, D, b, c, d = (X.flip(1) for X in (B, C, D, B.T, C.T, D.T))
    array = ((A, B, C, D), (-B, A, -d, c), (-C, d, A, -b), (-D, -c, b, A))
    return torch.cat([torch.cat(row, 1) for row in array]).to(torch.int8)


@functools.cache
def orders_of(length: int, layout: str = "auto") -> tuple[int, ...]:
    """The orders of the bases of a length's matrix, outermost first; what they leave of it is a power of two.

    Args:
        length: N.
        layout: ``quarot``: QuaRot's; ``auto``: QuaRot's where it has one, else the product with the smallest sum of
            orders, a power of two counting its logarithm.

    Raises:
        ValueError: no Hadamard matrix of that order is constructed here.
    """
    orders = _quarots(length) if length > 0 else None
    if orders is not None:
        return orders
    if length > 0 and layout == "quarot":
        raise ValueError(f"QuaRot has no Hadamard matrix of order {length}; layout='auto' may have one")
    orders = _cheapest(length)[1] if length > 0 else None
    if orders is None:
        raise ValueError(
            f"no Hadamard matrix of order {length} is constructed here: it must be 1, 2 or a multiple of 4 that is a "
            f"product of powers of two and of orders up to {LARGEST} that Paley's or Williamson's constructions reach"
        )
    return orders


def _quarots(length: int) -> tuple[int, ...] | None:
    orders = _QUAROT.get(length // (length & -length))
    if orders is not None and length % math.prod(orders) == 0:
        return orders
    return (20,) if length == 20 else None


@functools.cache
def _cheapest(length: int) -> tuple[float, tuple[int, ...] | None]:
    """(the sum, the orders ascending) of the cheapest product, (infinity, None) where there is none."""
    if length & (length - 1) == 0:
        return math.log2(length), ()
    best: tuple[float, tuple[int, ...] | None] = (math.inf, None)
    for order in range(12, min(length, LARGEST) + 1, 4):
        if length % order == 0 and order & (order - 1) and is_base(order):
            cost, rest = _cheapest(length // order)
            if rest is not None and cost + order < best[0]:
                best = cost + order, tuple(sorted((order, *rest)))
    return best


@_kept
def _packed(orders: tuple[int, ...]) -> Tensor:
    words = []
    for order in orders:
        H = base(order)
        for matrix in (H, H.T):
            bits = torch.zeros(order, -(-order // 32) * 32, dtype=torch.int64)
            bits[:, :order] = matrix < 0
            word = (bits.reshape(order, -1, 32) << torch.arange(32)).sum(-1)
            words.append((word - ((word >> 31) << 32)).to(torch.int32).reshape(-1))
    return torch.cat(words)


@_kept
def _packed_on(orders: tuple[int, ...], device: torch.device) -> Tensor:
    return _packed(orders).to(device)


def signs_of(orders: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The bases' signs as bits, None where there is no base.

    For each base its rows and then its columns, each in ceil(order / 32) int32 words: bit j of word w is set where
    entry 32 w + j is -1.
    """
    if not orders:
        return None
    if torch._C._len_torch_dispatch_stack() or device.type == "meta":  # fake tensors: one of the mode's own
        return torch.tensor(_packed(orders).tolist(), dtype=torch.int32, device=device)
    return _packed_on(orders, device)


def unpacked(signs: Tensor, orders: tuple[int, ...], transpose: bool) -> list[Tensor]:
    """The bases of :func:`signs_of` as bool matrices, True where an entry is -1; or their transposes."""
    matrices, start = [], 0
    for order in orders:
        words = -(-order // 32)
        first = start + (order * words if transpose else 0)
        rows = signs[first : first + order * words].reshape(order, words, 1)
        bits = rows >> torch.arange(32, dtype=torch.int32, device=signs.device) & 1
        matrices.append(bits.reshape(order, -1)[:, :order].bool())
        start += 2 * order * words
    return matrices
