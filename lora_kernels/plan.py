"""What every layer of a step shares: the rows of a batch, grouped by adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _check
from .ops._dispatch import Op, gpu
from .reference import low_rank as reference

lora_plan_ = Op(
    reference.lora_plan_,
    mutates=("table",),
    fake=lambda table, ids, indptr, num_adapters, order=None: None,
    prefers_cuda=lambda table, *_: gpu(table.device).cuda,
)


class BatchPlan:
    """The rows of a batch grouped by adapter, at fixed addresses and without a synchronisation.

    Taken wherever a function takes ``adapter_ids`` (or ``seg_indptr, adapter_ids``); build it once a step instead of
    once a layer. The module ``lora_kernels.reference.low_rank`` describes the table.

    It may be of fewer rows than x has (but for a mixture): the rest has no adapter, as where an engine pads a batch.

    The rows may be told in three forms: an id a row; an id a segment of rows; or either of them in another order, as
    engines do that sort a batch by adapter: then the ids or segments are of rows ``order[0], order[1], ...``

    Attributes:
        table: int32 ``[3 + L + capacity]``, the grouping itself.
        num_adapters: L.
        capacity: how many pairs of a row and an adapter it has room for.
    """

    __slots__ = ("capacity", "num_adapters", "table")

    def __init__(self, table: Tensor, capacity: int, num_adapters: int):
        self.table = table
        self.capacity = capacity
        self.num_adapters = num_adapters

    @property
    def num_pairs(self) -> int:
        """The pairs of a row and an adapter it is of now: M, or M * k for a mixture. Synchronises a GPU."""
        return int(self.table[0])

    @classmethod
    def empty(cls, capacity: int, num_adapters: int, device: torch.device | str = "cpu") -> BatchPlan:
        """A plan of no rows with room for ``capacity`` of them.

        Raises:
            ValueError: ``capacity`` or ``num_adapters`` is negative.
        """
        for name, value in (("capacity", capacity), ("num_adapters", num_adapters)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an int >= 0, got {value!r}")
        table = torch.zeros(3 + num_adapters + capacity, dtype=torch.int32, device=device)
        table[1:2].fill_(num_adapters)
        return cls(table, capacity, num_adapters)

    @classmethod
    def from_ids(cls, adapter_ids: Tensor, num_adapters: int, *, order: Tensor | None = None) -> BatchPlan:
        """The plan of ``adapter_ids``: int32 or int64 ``[M]``, or ``[M, k]`` for a mixture; -1 = no adapter.

        Args:
            order: int32 or int64 ``[M]``, a permutation: the row that each id is of. A mixture's is ``[M * k]``, of
                pairs, where those of row m are m * k to m * k + k - 1. On a GPU its values are not checked.
        """
        _check.tensor("adapter_ids", adapter_ids)
        return cls.empty(adapter_ids.numel(), num_adapters, adapter_ids.device).update_(adapter_ids, order=order)

    @classmethod
    def from_segments(
        cls, seg_indptr: Tensor, adapter_ids: Tensor, num_adapters: int, *, order: Tensor | None = None
    ) -> BatchPlan:
        """The plan of segments: rows ``seg_indptr[i]`` to ``seg_indptr[i + 1]`` use ``adapter_ids[i]``.

        Without an ``order`` it reads the number of rows from ``seg_indptr``, which synchronises a GPU once;
        :meth:`update_` never does.
        """
        if order is not None:
            _check.tensor("order", order)
        rows = _check.segments(seg_indptr, adapter_ids, num_adapters, None if order is None else order.numel())
        plan = cls.empty(rows, num_adapters, adapter_ids.device)
        return plan.update_(adapter_ids, seg_indptr=seg_indptr, order=order)

    def update_(
        self, adapter_ids: Tensor, *, seg_indptr: Tensor | None = None, order: Tensor | None = None
    ) -> BatchPlan:
        """Take the plan of other ids or segments, in place: no allocation, so a captured graph stays right.

        Raises:
            ValueError: more rows than the plan has room for, or ``order`` is no permutation of them.
            IndexError: an id is not below ``num_adapters``. The plan stays as it was in all cases.
        """
        if order is not None:
            _check.tensor("order", order)
        if seg_indptr is None:
            _check.ids(adapter_ids, "adapter_ids", self.num_adapters)
            rows = adapter_ids.numel()
        else:
            rows = self.capacity if order is None else order.numel()
            _check.segments(seg_indptr, adapter_ids, self.num_adapters, rows)
        if rows > self.capacity:
            raise ValueError(f"adapter_ids has {rows} entries, the plan has room for {self.capacity}")
        if adapter_ids.device != self.table.device:
            raise ValueError(f"adapter_ids is on {adapter_ids.device}, the plan on {self.table.device}")
        if order is not None:
            _check.permutation("order", order, rows, adapter_ids)
        lora_plan_(self.table, adapter_ids, seg_indptr, self.num_adapters, order)
        return self

    def __repr__(self) -> str:
        return f"BatchPlan(num_adapters={self.num_adapters}, capacity={self.capacity}, device={self.table.device})"
