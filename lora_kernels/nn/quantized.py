"""Frozen linear layers in 4 or 8 bits, alone and with one LoRA adapter.

Sources: Dettmers et al., QLoRA (arXiv 2305.14314); Hu et al., LoRA (arXiv 2106.09685). The initialisation is PEFT's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.quantized import quantized_linear, quantized_lora_linear
from ..quantization import QuantizedWeight, quantize
from ..quantization.tables import FP4, INT4, NF4
from .low_rank import OneAdapter, _frozen

if TYPE_CHECKING:
    from typing_extensions import Self

#: The values of the codes, which a state dict must agree on.
TABLES = {"nf4": NF4, "fp4": FP4, "int4": INT4}
#: The tensors of a packed weight, by its attributes.
TENSORS = ("codes", "scales", "offsets", "table", "order")


class PackedWeight(nn.Module):
    """What layers over a packed weight share: its tensors as buffers, which keep their dtypes, and a frozen bias.

    A state dict fits a layer with a weight of the same format, shape and group size.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    table: Tensor | None
    order: Tensor | None

    def _hold(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"weight must be a QuantizedWeight, got {type(weight).__name__}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias must be [{self.out_features}], got {list(bias.shape)}")
        self.fmt, self.group_size, self.dtype = weight.fmt, weight.group_size, weight.dtype
        for name in TENSORS:
            self.register_buffer(name, getattr(weight, name))
        if bias is not None:
            bias = (bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())).requires_grad_(False)
        self.bias = bias

    @property
    def weight(self) -> QuantizedWeight:
        """The packed weight, of the buffers."""
        return QuantizedWeight(
            self.fmt,
            self.codes,
            self.scales,
            shape=(self.out_features, self.in_features),
            group_size=self.group_size,
            dtype=self.dtype,
            offsets=self.offsets,
            table=self.table,
            order=self.order,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Buffers go where ``fn`` puts them, in the dtype they have."""
        before = {name: getattr(self, name) for name in TENSORS}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if tensor is not None and moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        table, own = state_dict.get(f"{prefix}table"), TABLES.get(self.fmt)
        if own and table is not None and not table.is_meta and not torch.equal(table.cpu(), torch.tensor(own)):
            errors.append(f"{prefix}table is not that of {self.fmt}: the weight is of another format")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class QuantizedLinear(PackedWeight):
    """y = x Wᵀ + bias with W packed and frozen.

    Args:
        weight: the packed weight; its tensors are shared. What only its origin's format stores is left behind.
        bias: [N], shared and frozen, or None.

    Attributes:
        codes, scales, offsets, table, order: the buffers, see :class:`lora_kernels.QuantizedWeight`.
        bias: [N] or None.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape.
    """

    def __init__(self, weight: QuantizedWeight, *, bias: Tensor | None = None):
        super().__init__()
        self._hold(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return quantized_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes and the format, for ``repr``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, fmt={self.fmt}, group_size={self.group_size}"


class QuantizedLoRALinear(PackedWeight, OneAdapter):
    """y = x Wᵀ + bias + s (x̃ Aᵀ) Bᵀ with W packed, x̃ = dropout(x) in training mode, and s = alpha / rank.

    A starts Kaiming-uniform and B zero, so that the layer starts as its base. W's tensors are buffers, and stand in the
    state dict by their own names; they keep their dtypes when the layer is moved to another. A state dict fits a layer
    with a weight of the same format, shape and group size.

    Args:
        weight: the base, packed; its tensors are shared. What only its origin's format stores is left behind.
        rank: R.
        alpha: s times the rank, or with ``rslora`` its root; default the rank.
        bias: [N], shared and frozen, or None.
        dropout: the probability that an element of x is dropped before A, in training mode.
        rslora: s = alpha / √rank.
        dtype: of A and B: float32 masters, or that of x.

    Attributes:
        codes, scales, offsets, table, order: the buffers, see :class:`lora_kernels.QuantizedWeight`.
        bias: [N] or None.
        A, B: [R, K] and [N, R], the trainable parameters.
        scaling: s.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        rank: int,
        alpha: float | None = None,
        *,
        bias: Tensor | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(rank, alpha, dropout, rslora)
        self._hold(weight, bias)
        self._add_factors(dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        *,
        fmt: str = "nf4",
        group_size: int | None = None,
        nested: bool = False,
        symmetric: bool = True,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The layer over the quantised weight of an existing linear, whose bias is shared, and frozen.

        Args:
            fmt, group_size, nested, symmetric: as :func:`lora_kernels.quantize` takes them.
        """
        weight, bias = _frozen(linear)
        packed = quantize(weight.detach(), fmt, group_size=group_size, nested=nested, symmetric=symmetric)
        return cls(packed, rank, alpha, bias=bias, dropout=dropout, rslora=rslora, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return quantized_lora_linear(
            x,
            self.weight,
            self.A,
            self.B,
            scaling=self.scaling,
            bias=self.bias,
            dropout=self.dropout,
            training=self.training,
        )

    def extra_repr(self) -> str:
        """Sizes and the format, for ``repr``."""
        return f"{super().extra_repr()}, fmt={self.fmt}, group_size={self.group_size}"
