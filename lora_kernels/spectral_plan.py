"""Where the coefficients of a sparse spectrum stand, and in what order kernels read them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from .ops import _check
from .ops.transforms import _orders, _signs
from .reference.spectral import KINDS, length_of


class SpectralPlan:
    """The places of the n coefficients of a spectrum S [N, K]: coefficient i stands at (rows[i], cols[i]).

    Coefficients at one place add up. A plan is immutable: give a new one where locations move. It may be used with
    every kind; what the kernels read of it is made at the first call and kept.

    Args:
        rows, cols: int64 [n], from 0 to N - 1 and to K - 1.
        shape: (N, K), that of ΔW.
        layout: which Hadamard matrix of order K the kind "wht" means, as :func:`lora_kernels.wht` takes it.

    Attributes:
        rows, cols, shape, layout: as given.

    Raises:
        TypeError: rows or cols is no int64 tensor, or shape no two ints.
        ValueError: they are no vectors of one length on one device, or shape or layout is none.
        IndexError: a place outside of shape, on the CPU.
    """

    __slots__ = ("_entries", "cols", "layout", "rows", "shape")

    def __init__(
        self,
        rows: Tensor,
        cols: Tensor,
        *,
        shape: tuple[int, int],
        layout: Literal["auto", "quarot"] = "auto",
    ):
        shape = _pair(shape)
        if layout not in ("auto", "quarot"):
            raise ValueError(f"layout must be 'auto' or 'quarot', got {layout!r}")
        for name, places, size in (("rows", rows, shape[0]), ("cols", cols, shape[1])):
            _check.tensor(name, places)
            if places.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, got {places.dtype}")
            if places.dim() != 1 or places.shape != rows.shape:
                raise ValueError(f"rows and cols must be [n] both, got {_check.shape(rows)} and {_check.shape(cols)}")
            if _check.readable(places) and places.numel():
                wrong = ((places < 0) | (places >= size)).nonzero()
                if wrong.numel():
                    at = int(wrong[0])
                    raise IndexError(f"{name}[{at}] is {int(places[at])}, out of range for shape {shape}")
        if rows.device != cols.device:
            raise ValueError(f"rows is on {rows.device}, cols on {cols.device}")
        # Copies: whoever changes his own tensors changes no plan.
        self.rows, self.cols, self.shape, self.layout = rows.clone(), cols.clone(), shape, layout
        self._entries: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def random(cls, n: int, shape: tuple[int, int], seed: int = 777) -> SpectralPlan:
        """n different places, those that PEFT's FourierFT and WaveFT draw from a seed; kept for later calls.

        They are ``torch.randperm(N * K)[:n]`` with a CPU generator of that seed, row by row; it takes about a second
        for a shape of 4096 by 4096.

        Raises:
            TypeError: shape is no two ints, or seed none.
            ValueError: n is not from 1 to N K.
        """
        N, K = _pair(shape)
        if type(seed) is not int:
            raise TypeError(f"seed must be an int, got {seed!r}")
        if type(n) is not int or not 1 <= n <= N * K:
            raise ValueError(f"n must be from 1 to {N * K} for shape {(N, K)}, got {n!r}")
        return _random(n, N, K, seed)

    @property
    def n(self) -> int:
        """How many coefficients there are."""
        return self.rows.shape[0]

    @property
    def device(self) -> torch.device:
        """Where rows and cols are."""
        return self.rows.device

    def to(self, device: torch.device | str) -> SpectralPlan:
        """The plan on a device; itself where it is there."""
        if torch.device(device) == self.device:
            return self
        with _kept():
            rows, cols = self.rows.to(device), self.cols.to(device)
        return SpectralPlan(rows, cols, shape=self.shape, layout=self.layout)

    def entries(self, kind: str) -> tuple[Tensor, Tensor]:
        """``by_row`` and ``by_column`` of a kind, see :mod:`lora_kernels.reference.spectral`."""
        self._make(kind)
        return self._entries[kind]

    @torch.compiler.assume_constant_result  # a compiler has them made while it traces, and reads them from the plan
    def _make(self, kind: str) -> bool:
        if kind not in self._entries:
            if kind not in KINDS:
                raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
            with _disable_current_modes(), torch.inference_mode(False):
                self._entries[kind] = self.ordered(kind)
        return True

    def hadamard(self, kind: str) -> tuple[Tensor | None, tuple[int, ...]]:
        """(signs, orders) of the matrix that the kind "wht" means, (None, ()) for the others."""
        if kind != "wht":
            return None, ()
        orders = _orders(int(self.shape[1]), self.layout)
        return _signs(orders, self.device) if orders else None, orders

    def ordered(self, kind: str) -> tuple[Tensor, Tensor]:
        """:meth:`entries`, made anew and not kept."""
        if self.device.type == "meta":  # where a wave has its sines is not known: the most there may be
            entries = self.n * (2 if kind == "fourier" else 1)
            by_row, by_column = (
                self.rows.new_empty(length_of(kind, size) + 1 + 2 * entries, dtype=torch.int32) for size in self.shape
            )
            return by_row, by_column
        (N, K), index = self.shape, torch.arange(self.n, device=self.device)
        rows, cols = self.rows, self.cols
        if kind == "haar":  # the detail of the columns stands right of the mean, where T₁ and T₂ have it below
            top, left = rows < (N + 1) // 2, cols < (K + 1) // 2
            turn = (top & ~left).long() - (~top & left).long()
            rows, cols = rows + turn * ((N + 1) // 2), cols - turn * ((K + 1) // 2)
        elif kind == "fourier":  # cos(a + b) = cos a cos b - sin a sin b
            p, q = torch.minimum(rows, N - rows), torch.minimum(cols, K - cols)
            waves = (p > 0) & (2 * p < N) & (q > 0) & (2 * q < K)  # where there are sines
            negative = ((p == rows) == (q == cols))[waves]
            rows, cols = torch.cat((p, N - p[waves])), torch.cat((q, K - q[waves]))
            index = torch.cat((index, torch.where(negative, ~index[waves], index[waves])))
        N, K = length_of(kind, N), length_of(kind, K)
        return _sorted(rows, cols, index, N, K), _sorted(cols, rows, index, K, N)

    def __repr__(self) -> str:
        return f"SpectralPlan(n={self.n}, shape={self.shape}, layout={self.layout!r}, device={self.device})"

    def __deepcopy__(self, memo: Any) -> SpectralPlan:
        return self

    def __reduce__(self) -> Any:
        return _made, (self.rows, self.cols, self.shape, self.layout)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """For tensors that outlive the call they are made in: autograd may save them, no mode has a hand in them."""
    if is_compiling():
        yield
        return
    with _disable_current_modes(), torch.inference_mode(False):
        yield


def _made(rows: Tensor, cols: Tensor, shape: tuple[int, int], layout: Any) -> SpectralPlan:
    return SpectralPlan(rows, cols, shape=shape, layout=layout)


def _pair(shape: Any) -> tuple[int, int]:
    if not isinstance(shape, (tuple, list)) or len(shape) != 2 or not all(type(n) is int and n >= 0 for n in shape):
        raise TypeError(f"shape must be (N, K), two ints, got {shape!r}")
    return shape[0], shape[1]


def _sorted(rows: Tensor, cols: Tensor, index: Tensor, N: int, K: int) -> Tensor:
    places, order = (rows * K + cols).sort(stable=True)
    starts = torch.searchsorted(places, torch.arange(N + 1, device=rows.device) * K)
    return torch.cat((starts, cols[order], index[order])).int()


@functools.lru_cache(maxsize=64)
def _random(n: int, N: int, K: int, seed: int) -> SpectralPlan:
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        places = torch.randperm(N * K, generator=torch.Generator().manual_seed(seed))[:n].clone()
        return SpectralPlan(places // K, places % K, shape=(N, K))
