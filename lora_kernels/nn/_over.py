"""What spectral layers over a base of either kind share: the frozen base, and values in float32 or another dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.spectral import Kind, spectral_delta_weight, spectral_linear
from ..quantization import QuantizedWeight
from ..spectral_plan import SpectralPlan
from .low_rank import _frozen
from .quantized import QuantizedLinear


class SpectrumOver(nn.Module):
    """y = base(x) + x ΔWᵀ with ΔW = scale · K(S), the base frozen and S's values trained, from zero on.

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

    scale: float

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
    def plan(self) -> SpectralPlan:
        """Where the values stand."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y = self.base(x)
        return spectral_linear(as_result(x, y), self.values, self.plan, kind=self.kind, scale=self.scale, y=y)

    def delta_weight(self) -> Tensor:
        """ΔW, [N, K] in the dtype of the base's weight."""
        dtype = self.base.weight.dtype
        return spectral_delta_weight(self.values, self.plan, kind=self.kind, scale=self.scale, dtype=dtype)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        (N, K), n = self.shape, self.values.shape[0]
        return f"in_features={K}, out_features={N}, n={n}, kind={self.kind}, scale={self.scale:g}"


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
