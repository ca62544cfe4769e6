"""A frozen linear layer, packed or not, with QWHA's adapter.

Source: QWHA (arXiv 2509.17428).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..init.qwha import QWHAReport, qwha_init
from ..quantization import QuantizedWeight, quantize
from ..spectral_plan import SpectralPlan
from ._over import SpectrumOver, shape_of
from .low_rank import _frozen

if TYPE_CHECKING:
    from typing_extensions import Self


class QWHALinear(SpectrumOver):
    """y = base(x) + x ΔWᵀ with ΔW = α / √(N K) · S H, S a sparse spectrum and H = ±1/√K the Walsh-Hadamard matrix.

    With values of zero, as the constructor leaves them, the layer starts as its base. :meth:`from_linear` and
    :meth:`from_residual` start it as close to the weight before quantisation as n coefficients can come.

    The places are buffers and stand in the state dict, which fits a layer with as many. They keep their dtype when the
    layer is moved to another.

    Args:
        base: a linear layer, which is shared and frozen, or a packed weight, whose tensors are shared.
        plan: the places of the values, of the base's shape; its layout says which Hadamard matrix H is.
        alpha: α; QWHA's own code takes 4000.
        bias: [N], shared and frozen, or None; of a packed weight.
        dtype: of the values: float32 masters, or that of x.

    Attributes:
        base: the layer, or a :class:`lora_kernels.nn.QuantizedLinear`.
        values: [n], the trainable parameter.
        rows, cols: int64 [n], the places.
        layout, scale: the matrix, and α / √(N K).
        report: what the initialisation reached, or None.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or no Hadamard matrix of order K.
    """

    rows: Tensor
    cols: Tensor

    def __init__(
        self,
        base: nn.Linear | QuantizedWeight,
        plan: SpectralPlan,
        alpha: float = 4000.0,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        if not isinstance(plan, SpectralPlan):
            raise TypeError(f"plan must be a SpectralPlan, got {type(plan).__name__}")
        super().__init__(base, plan.n, "wht", bias=bias, dtype=dtype)
        if plan.shape != self.shape:
            raise ValueError(f"the plan is of shape {plan.shape}, the base {self.shape}")
        plan.hadamard("wht")
        self.layout, self.scale = plan.layout, alpha / math.sqrt(self.shape[0] * self.shape[1])
        for name in ("rows", "cols"):  # copies: a loaded state is written into them
            self.register_buffer(name, getattr(plan, name).detach().to(self.values.device, copy=True))
        self._plan: SpectralPlan | None = None
        self.report: QWHAReport | None = None

    @classmethod
    def from_residual(
        cls,
        base: nn.Linear | QuantizedWeight,
        residual: Tensor,
        n: int,
        alpha: float = 4000.0,
        *,
        gram: Tensor | None = None,
        t: float = 1.0,
        layout: Literal["auto", "quarot"] = "auto",
        damping: float = 1e-4,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The layer with n coefficients whose ΔW makes up for a residual, see :func:`lora_kernels.init.qwha_init`.

        Args:
            residual: [N, K], the weight that the base should have, less what it has.
            n: how many coefficients; r (N + K) are as many parameters as LoRA has at rank r.
            gram, t, layout, damping: as ``qwha_init`` takes them.
        """
        N, K = shape_of(base)
        if isinstance(residual, Tensor) and residual.shape != (N, K):
            raise ValueError(f"residual must be {[N, K]} as the base, got {list(residual.shape)}")
        scale = alpha / math.sqrt(N * K)
        init = qwha_init(residual, n, gram=gram, t=t, layout=layout, scale=scale, damping=damping)
        layer = cls(base, init.plan, alpha, bias=bias, dtype=dtype)
        with torch.no_grad():
            layer.values.copy_(init.values)
        layer.report = init.report
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        n: int,
        alpha: float = 4000.0,
        *,
        fmt: str = "nf4",
        group_size: int | None = None,
        nested: bool = False,
        symmetric: bool = True,
        gram: Tensor | None = None,
        t: float = 1.0,
        layout: Literal["auto", "quarot"] = "auto",
        damping: float = 1e-4,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The layer over the quantised weight of a linear one, whose bias is shared and frozen, with the n coefficients
        that make up best for what was lost.

        Args:
            fmt, group_size, nested, symmetric: as :func:`lora_kernels.quantize` takes them.
            The others: as :meth:`from_residual` takes them.
        """
        weight, bias = _frozen(linear)
        packed = quantize(weight.detach(), fmt, group_size=group_size, nested=nested, symmetric=symmetric)
        residual = weight.detach().float() - packed.dequantize(torch.float32)
        return cls.from_residual(
            packed, residual, n, alpha, gram=gram, t=t, layout=layout, damping=damping, bias=bias, dtype=dtype
        )

    @property
    def plan(self) -> SpectralPlan:
        """Where the values stand."""
        if self._plan is None:
            self._plan = SpectralPlan(self.rows, self.cols, shape=self.shape, layout=self.layout)
        return self._plan

    def extra_repr(self) -> str:
        """Sizes and the layout, for ``repr``."""
        return f"{super().extra_repr()}, layout={self.layout}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._plan = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        for name, size in (("rows", self.shape[0]), ("cols", self.shape[1])):
            places = state_dict.get(prefix + name)
            if places is not None and not places.is_meta and ((places < 0) | (places >= size)).any():
                errors.append(f"{prefix}{name} has places outside of the weight {list(self.shape)}")
                return
        self._plan, self.rows, self.cols = None, self.rows.clone(), self.cols.clone()  # a plan stays what it was
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
