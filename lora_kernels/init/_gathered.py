"""Many positive definite systems at a time, whose matrices are all parts of one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Numbers of the matrices that are solved with at a time: on a CPU they should stay in its cache.
AT_ONCE = {"cpu": 1 << 20}
AT_ONCE_ELSEWHERE = 1 << 26
#: How much larger than the smallest matrix of a group the others may be, all being padded to the largest.
SPREAD = 1.1
#: The size of the blocks of a factorisation.
BLOCK = 64


def alike(counts: Tensor) -> Iterator[tuple[Tensor, int]]:
    """(rows, the largest count among them) in turns, rows of like counts together and those with none left out."""
    order = counts.argsort(stable=True)
    ascending, device = counts[order].tolist(), counts.device.type
    start, at_once = ascending.count(0), AT_ONCE.get(device, AT_ONCE_ELSEWHERE)
    while start < len(ascending):
        end, limit = start + 1, SPREAD * ascending[start] + 4
        while end < len(ascending) and ascending[end] <= limit and (end + 1 - start) * ascending[end] ** 2 <= at_once:
            end += 1
        yield order[start:end], ascending[end - 1]
        start = end


class Gathered:
    """Solves with A = G[s, s], s places in a symmetric G; one of them, where G is zero, stands for none.

    The memory for the matrices is kept from call to call.
    """

    def __init__(self, G: Tensor, none: int):
        self.G, self.none = G, none
        self._places, self._matrices = G.new_empty(0, dtype=torch.int64), G.new_empty(0)

    def solve(self, places: Tensor, b: Tensor) -> tuple[Tensor, int]:
        """x with A x = b.

        A matrix that is not positive definite as it comes is damped, by as little of 0.001, 0.01, 0.1 or 1 as will do.

        Args:
            places: int64 [m, p], the places of m matrices.
            b: [m, p], zero where a place is none.

        Returns:
            x [m, p], and how many matrices were damped.

        Raises:
            ValueError: a matrix is not positive definite after all.
        """
        A = self._gather(places)
        info = cholesky_(A)
        wrong, damping = info.nonzero()[:, 0], 1e-3
        damped = len(wrong)
        while len(wrong) and damping <= 1:
            again = Gathered(self.G, self.none)._gather(places[wrong])
            again.diagonal(dim1=1, dim2=2).add_(damping)
            info, damping = cholesky_(again), 10 * damping
            A[wrong] = again
            wrong = wrong[info != 0]
        if len(wrong):
            raise ValueError("gram must be positive semi-definite, but a part of it has a negative eigenvalue")
        return torch.cholesky_solve(b[..., None], A, upper=True)[..., 0], damped

    def _gather(self, places: Tensor) -> Tensor:
        m, p = places.shape
        size = m * p * p
        if self._matrices.numel() < size:
            self._places, self._matrices = self._places.new_empty(size), self._matrices.new_empty(size)
        at, A = self._places[:size], self._matrices[:size]
        torch.add(places[:, None, :], places[:, :, None], alpha=self.G.shape[0], out=at.view(m, p, p))
        A = torch.index_select(self.G.view(-1), 0, at, out=A).view(m, p, p)
        A.diagonal(dim1=1, dim2=2).add_(places == self.none)
        return A


def cholesky_(A: Tensor) -> Tensor:
    """Uᵀ U = A for each matrix of A [m, p, p], U written into A's upper triangle; returns [m], 0 where it went well.

    By blocks: LAPACK takes one matrix after the other, while the products between blocks use every thread.
    """
    p, info = A.shape[-1], torch.zeros(A.shape[0], dtype=torch.int32, device=A.device)
    for start in range(0, p, BLOCK):
        end = min(start + BLOCK, p)
        U, own = torch.linalg.cholesky_ex(A[:, start:end, start:end], upper=True)
        A[:, start:end, start:end] = U
        info |= own
        if end < p:
            panel = torch.linalg.solve_triangular(U.mT, A[:, start:end, end:], upper=False)
            A[:, start:end, end:] = panel
            A[:, end:, end:] -= panel.mT @ panel
    return info
