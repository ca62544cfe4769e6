"""Frozen linear layers with one LoRA adapter or many.

Source: Hu et al., LoRA (arXiv 2106.09685); the initialisation is PEFT's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.lora_linear import lora_linear
from ..ops.low_rank import multi_lora
from ..plan import BatchPlan


class LoRALinear(nn.Module):
    """y = x Wᵀ + bias + s (x Aᵀ) Bᵀ with W frozen and s = alpha / rank.

    A starts Kaiming-uniform and B zero, so that the layer starts as its base.

    Args:
        linear: the base; its weight and bias are shared, and frozen.
        rank: R.
        alpha: s times the rank; default the rank, s = 1.
        dtype: of A and B: float32 masters, or the weight's dtype.

    Attributes:
        weight, bias: [N, K] and [N] or None, the base's.
        A, B: [R, K] and [N, R], the trainable parameters.
        scaling: s.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float | None = None, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.rank, self.scaling = _rank_and_scaling(rank, alpha)
        self.weight, self.bias = _frozen(linear)
        out_features, in_features = linear.weight.shape
        self.A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=linear.weight.device))
        self.B = nn.Parameter(torch.empty(out_features, rank, dtype=dtype, device=linear.weight.device))
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, alpha: float | None = None, *, dtype: torch.dtype = torch.float32
    ) -> LoRALinear:
        """The layer over an existing linear."""
        return cls(linear, rank, alpha, dtype=dtype)

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return lora_linear(x, self.weight, self.A, self.B, scaling=self.scaling, bias=self.bias)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, rank={self.rank}, scaling={self.scaling:g}"


class MultiLoRALinear(nn.Module):
    """y[m] = x[m] Wᵀ + bias + s (x[m] Aᵀ) Bᵀ with the A and B of row m's own adapter, W frozen and s = alpha / rank.

    Args:
        linear: the base; its weight and bias are shared, and frozen.
        num_adapters: L.
        rank: R of every adapter.
        alpha: s times the rank; default the rank, s = 1.
        dtype: of A and B: float32 masters, or the weight's dtype.

    Attributes:
        weight, bias: [N, K] and [N] or None, the base's.
        A, B: [L, R, K] and [L, N, R], the trainable parameters.
        scaling: fp32 [L], a buffer; entries may be set one by one.
    """

    scaling: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        num_adapters: int,
        rank: int,
        alpha: float | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.rank, scaling = _rank_and_scaling(rank, alpha)
        self.num_adapters = num_adapters
        self.weight, self.bias = _frozen(linear)
        (out_features, in_features), device = linear.weight.shape, linear.weight.device
        self.A = nn.Parameter(torch.empty(num_adapters, rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(num_adapters, out_features, rank, dtype=dtype, device=device))
        self.register_buffer("scaling", torch.full((num_adapters,), scaling, dtype=torch.float32, device=device))
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        num_adapters: int,
        rank: int,
        alpha: float | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> MultiLoRALinear:
        """The layer over an existing linear."""
        return cls(linear, num_adapters, rank, alpha, dtype=dtype)

    def reset_parameters(self) -> None:
        """Every A Kaiming-uniform, every B zero."""
        for a in self.A:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor, adapter_ids: Tensor | BatchPlan) -> Tensor:
        """[..., K] -> [..., N]; ``adapter_ids`` one a row of x.reshape(-1, K), -1 = none, or the step's plan."""
        y = nn.functional.linear(x, self.weight, self.bias)
        return multi_lora(x, self.A, self.B, adapter_ids, scaling=self.scaling, y=y)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        out_features, in_features = self.weight.shape
        return (
            f"in_features={in_features}, out_features={out_features}, "
            f"num_adapters={self.num_adapters}, rank={self.rank}"
        )


def _rank_and_scaling(rank: int, alpha: float | None) -> tuple[int, float]:
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an int >= 1, got {rank!r}")
    return rank, 1.0 if alpha is None else alpha / rank


def _frozen(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    if type(linear) is not nn.Linear:
        raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
    linear.requires_grad_(False)
    return linear.weight, linear.bias
