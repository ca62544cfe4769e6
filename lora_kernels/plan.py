"""What every layer of a step shares: the rows of a batch, grouped by adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _check
from .ops._dispatch import Op
from .reference import low_rank as reference

lora_plan_ = Op(reference.lora_plan_, mutates=("table",), fake=lambda table, ids, indptr, num_adapters: None)


class BatchPlan:
    """The rows of a batch grouped by adapter, at fixed addresses and without a synchronisation.

    Taken wherever a function takes ``adapter_ids`` (or ``seg_indptr, adapter_ids``); build it once a step instead of
    once a layer. The module ``lora_kernels.reference.low_rank`` describes the table.

    Attributes:
        table: int32 ``[3 + L + capacity]``, the grouping itself.
        num_adapters: L.
        num_pairs: pairs of a row and an adapter it holds now: M, or M * k for a mixture.
    """

    __slots__ = ("capacity", "num_adapters", "num_pairs", "table")

    def __init__(self, table: Tensor, capacity: int, num_adapters: int, num_pairs: int):
        self.table = table
        self.capacity = capacity
        self.num_adapters = num_adapters
        self.num_pairs = num_pairs

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
        return cls(table, capacity, num_adapters, 0)

    @classmethod
    def from_ids(cls, adapter_ids: Tensor, num_adapters: int) -> BatchPlan:
        """The plan of ``adapter_ids``: int32 or int64 ``[M]``, or ``[M, k]`` for a mixture; -1 = no adapter."""
        _check.ids(adapter_ids, "adapter_ids", num_adapters)
        plan = cls.empty(adapter_ids.numel(), num_adapters, adapter_ids.device)
        plan._write(adapter_ids, None, adapter_ids.numel())
        return plan

    @classmethod
    def from_segments(cls, seg_indptr: Tensor, adapter_ids: Tensor, num_adapters: int) -> BatchPlan:
        """The plan of segments: rows ``seg_indptr[i]`` to ``seg_indptr[i + 1]`` use ``adapter_ids[i]``.

        Reads the number of rows from ``seg_indptr``, which synchronises a GPU once.
        """
        rows = _check.segments(seg_indptr, adapter_ids, num_adapters)
        plan = cls.empty(rows, num_adapters, adapter_ids.device)
        plan._write(adapter_ids, seg_indptr, rows)
        return plan

    def update_(self, adapter_ids: Tensor) -> BatchPlan:
        """Take the plan of other ids, in place: no allocation, so a captured graph that reads it stays right.

        Raises:
            ValueError: more ids than the plan has room for.
            IndexError: an id is not below ``num_adapters``; the plan stays as it was.
        """
        _check.ids(adapter_ids, "adapter_ids", self.num_adapters)
        if adapter_ids.numel() > self.capacity:
            raise ValueError(f"adapter_ids has {adapter_ids.numel()} entries, the plan has room for {self.capacity}")
        if adapter_ids.device != self.table.device:
            raise ValueError(f"adapter_ids is on {adapter_ids.device}, the plan on {self.table.device}")
        self._write(adapter_ids, None, adapter_ids.numel())
        return self

    def _write(self, ids: Tensor, indptr: Tensor | None, num_pairs: int) -> None:
        lora_plan_(self.table, ids, indptr, self.num_adapters)
        self.num_pairs = num_pairs

    def __repr__(self) -> str:
        return f"BatchPlan(num_pairs={self.num_pairs}, num_adapters={self.num_adapters}, capacity={self.capacity})"
