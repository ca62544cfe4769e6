"""What spectral layers share, and those among them whose base is a linear layer or a packed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.spectral import Kind, spectral_delta_weight, spectral_linear
from ..quantization import QuantizedWeight
from .low_rank import _frozen
from .quantized import QuantizedLinear


class SpectralLayer(nn.Module):
    """y = base(x) + x ΔWᵀ with ΔW = scale · K(S), the base frozen and S's values trained.

    A layer adds its base as :meth:`_based`, :attr:`shape`, the places as :attr:`plan`, and the dtype of ΔW.
    """

    values: Tensor
    kind: Kind
    scale: float
    shape: Any
    plan: Any
    weight_dtype: Any

    def _based(self, x: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no base")

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y = self._based(x)
        return spectral_linear(as_result(x, y), self.values, self.plan, kind=self.kind, scale=self.scale, y=y)

    def delta_weight(self) -> Tensor:
        """ΔW, [N, K] in the dtype of the base's weight."""
        return spectral_delta_weight(self.values, self.plan, kind=self.kind, scale=self.scale, dtype=self.weight_dtype)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        (N, K), n = self.shape, self.values.shape[0]
        return f"in_features={K}, out_features={N}, n={n}, kind={self.kind}, scale={self.scale:g}"


class SpectrumOver(SpectralLayer):
    """The layer over a base that it holds; values start at zero.

    Args:
        base: a linear layer, which is shared and frozen, or a packed weight.
        n: how many values.
        kind: K.
        bias: [N], shared and frozen, or None; of a packed weight, since a linear layer has its own.
        dtype: of the values.

    Attributes:
        base: the layer, or a :class:`lora_kernels.nn.QuantizedLinear`.
        values: [n], a trainable parameter.
        scale: what K(S) is multiplied by; set by the layer.
    """

    def __init__(
        self, base: nn.Linear | QuantizedWeight, n: int, kind: Kind, *, bias: Tensor | None, dtype: torch.dtype
    ):
        super().__init__()
        shape_of(base)
        if isinstance(base, QuantizedWeight):
            self.base: nn.Linear | QuantizedLinear = QuantizedLinear(base, bias=bias)
        elif bias is not None:
            raise ValueError("bias is for a packed weight; a linear layer has its own")
        else:
            _frozen(base)
            self.base = base
        self.kind: Kind = kind
        self.values = nn.Parameter(torch.zeros(n, dtype=dtype, device=self.base.weight.device))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.base.out_features, self.base.in_features

    @property
    def weight_dtype(self) -> torch.dtype:
        """That of the base's weight."""
        return self.base.weight.dtype

    def _based(self, x: Tensor) -> Tensor:
        return self.base(x)


def shape_of(base: nn.Linear | QuantizedWeight) -> tuple[int, int]:
    """(N, K) of a base, which must be one."""
    if isinstance(base, QuantizedWeight):
        return base.shape[0], base.shape[1]
    if type(base) is not nn.Linear:
        raise TypeError(f"base must be a torch.nn.Linear or a QuantizedWeight, got {type(base).__name__}")
    return base.out_features, base.in_features


def as_result(x: Tensor, y: Tensor) -> Tensor:
    """x in y's dtype where autocast has made y of a lower one."""
    return x if y.dtype in (x.dtype, torch.float32) else x.to(y.dtype)
