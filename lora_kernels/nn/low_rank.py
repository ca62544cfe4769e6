"""Frozen linear layers with one LoRA adapter or many, or a DoRA adapter.

Sources: Hu et al., LoRA (arXiv 2106.09685); Kalajdzievski, rsLoRA (arXiv 2312.03732); Liu et al., DoRA (arXiv
2402.09353). The initialisation is PEFT's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..ops.lora_linear import lora_linear, row_norms_sq
from ..ops.low_rank import multi_lora
from ..plan import BatchPlan

if TYPE_CHECKING:
    from typing_extensions import Self


class OneAdapter(nn.Module):
    """What layers with one adapter over a frozen ``weight`` share: A, B and s."""

    weight: Any

    def __init__(self, rank: int, alpha: float | None, dropout: float, rslora: bool):
        super().__init__()
        self.rank, self.scaling = _rank_and_scaling(rank, alpha, rslora)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability from 0 to 1, got {dropout!r}")
        self.dropout = dropout

    def _add_factors(self, dtype: torch.dtype) -> None:
        (out_features, in_features), device = self.weight.shape, self.weight.device
        self.A = nn.Parameter(torch.empty(self.rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(out_features, self.rank, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        out_features, in_features = self.weight.shape
        text = f"in_features={in_features}, out_features={out_features}, rank={self.rank}, scaling={self.scaling:g}"
        return text + (f", dropout={self.dropout:g}" if self.dropout else "")


class LoRALinear(OneAdapter):
    """y = x Wᵀ + bias + s (x̃ Aᵀ) Bᵀ with W frozen, x̃ = dropout(x) in training mode, and s = alpha / rank.

    A starts Kaiming-uniform and B zero, so that the layer starts as its base.

    Args:
        linear: the base; its weight and bias are shared, and frozen.
        rank: R.
        alpha: s times the rank, or with ``rslora`` its root; default the rank.
        dropout: the probability that an element of x is dropped before A, in training mode.
        rslora: s = alpha / √rank.
        dtype: of A and B: float32 masters, or the weight's dtype.

    Attributes:
        weight, bias: [N, K] and [N] or None, the base's.
        A, B: [R, K] and [N, R], the trainable parameters.
        scaling: s.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(rank, alpha, dropout, rslora)
        self.weight, self.bias = _frozen(linear)
        self._add_factors(dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The layer over an existing linear."""
        return cls(linear, rank, alpha, dropout=dropout, rslora=rslora, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self._forward(x)

    def _forward(self, x: Tensor, **more: Tensor | None) -> Tensor:
        return lora_linear(
            x,
            self.weight,
            self.A,
            self.B,
            scaling=self.scaling,
            bias=self.bias,
            dropout=self.dropout,
            training=self.training,
            **more,
        )


class DoRALinear(LoRALinear):
    """y = c∘(x Wᵀ + s (x Aᵀ) Bᵀ) + bias with W frozen and c = magnitude / ‖W + s B A‖, the norm of each row.

    The gradients take the norm as a constant. In training mode with dropout, x̃ = dropout(x), it is PEFT's form
    y = x Wᵀ + bias + (c - 1)∘(x̃ Wᵀ) + c∘(s (x̃ Aᵀ) Bᵀ), which takes a second base product.

    A starts Kaiming-uniform, B zero and the magnitude as ‖W‖, so that the layer starts as its base. The squared norms
    of W are kept, and made again when W was changed, loaded or moved; only a write through ``weight.data`` goes unseen.

    Args:
        linear, rank, alpha, dropout, rslora: as for :class:`LoRALinear`.
        dtype: of A, B and the magnitude: float32 masters, or the weight's dtype.

    Attributes:
        weight, bias, A, B, scaling: as in :class:`LoRALinear`.
        magnitude: [N], a trainable parameter.
    """

    weight_norm_sq: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(linear, rank, alpha, dropout=dropout, rslora=rslora, dtype=dtype)
        self.magnitude = nn.Parameter(row_norms_sq(self.weight).sqrt_().to(dtype))
        self.register_buffer("weight_norm_sq", None, persistent=False)
        self._norms_of: tuple[int, int] | None = None

    def reset_parameters(self) -> None:
        """A Kaiming-uniform, B zero, the magnitude ‖W‖."""
        super().reset_parameters()
        if hasattr(self, "magnitude"):
            with torch.no_grad():
                self.magnitude.copy_(row_norms_sq(self.weight).sqrt_())

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self._forward(x, magnitude=self.magnitude, weight_norm_sq=self._norms())

    def _norms(self) -> Tensor | None:
        """‖W‖² of each row; None where a compiled graph must make it, which can't see whether W was changed."""
        if is_compiling():
            return None
        now = self.weight.data_ptr(), self.weight._version
        if self._norms_of != now or self.weight_norm_sq is None:
            self.weight_norm_sq, self._norms_of = row_norms_sq(self.weight), now
        return self.weight_norm_sq

    def _forget_norms(self) -> None:
        self.weight_norm_sq = self._norms_of = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._forget_norms()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_norms()
        super()._load_from_state_dict(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_norms()


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


def _rank_and_scaling(rank: int, alpha: float | None, rslora: bool = False) -> tuple[int, float]:
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an int >= 1, got {rank!r}")
    alpha = rank if alpha is None else alpha
    return rank, alpha / math.sqrt(rank) if rslora else alpha / rank


def _frozen(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    if type(linear) is not nn.Linear:
        raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
    linear.requires_grad_(False)
    return linear.weight, linear.bias
