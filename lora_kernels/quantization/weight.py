"""``QuantizedWeight``: a linear layer's weight in 4 or 8 bits a number, whichever format it came in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping


class Origin(Protocol):
    """What a format stores beyond the packed form, so that its own tensors come back bit for bit."""

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The format's tensors by its own keys, the layer's name left out."""
        ...

    def to(self, device: torch.device) -> Origin:
        """The same on a device."""
        ...


class QuantizedWeight:
    """W[n, k] = scales[n, j // g] · table[c[n, j]] + offsets[n, j // g] with k = order[j]: a frozen weight [N, K].

    Made by :func:`lora_kernels.quantize` or by a ``from_`` method. The codes of bitsandbytes, and its statistics where
    they are fp32, are shared with the tensors given; other formats are repacked once. Every format comes back bit for
    bit from :meth:`state_dict`.

    Attributes:
        fmt: "nf4", "fp4", "int4" or "int8".
        shape: (N, K).
        dtype: what it was quantised from, the default of :func:`lora_kernels.dequantize`.
        codes: c, uint8 [N, ceil(K / 2)], two in a byte and the even j's in the high half; or int8 [N, K].
        scales: fp32 [N, ceil(K / g)].
        offsets: fp32 [N, ceil(K / g)], or None: zero.
        table: fp32 [16], the values of the codes; None: an int8 is its own value.
        group_size: g, how many numbers of a row share a scale.
        order: int64 [K], the column of W that each column of codes is (GPTQ's act-order), or None: its own.
        origin: what else its format stores.
    """

    def __init__(
        self,
        fmt: str,
        codes: Tensor,
        scales: Tensor,
        *,
        shape: tuple[int, int],
        group_size: int,
        dtype: torch.dtype,
        offsets: Tensor | None = None,
        table: Tensor | None = None,
        order: Tensor | None = None,
        origin: Origin | None = None,
    ):
        self.fmt, self.shape, self.dtype, self.group_size = fmt, torch.Size(shape), dtype, group_size
        self.codes, self.scales, self.offsets, self.table = codes, scales, offsets, table
        self.order, self.origin = order, origin

    @classmethod
    def from_bitsandbytes(cls, weight: Any, state: Any = None) -> QuantizedWeight:
        """Of bitsandbytes' ``Params4bit`` or ``Int8Params``, or of its ``quantize_4bit``'s result and state; shared.

        Args:
            weight: the parameter, or the packed tensor.
            state: its ``QuantState`` (4 bits) or the row statistics ``SCB`` fp32 [N] (8 bits); the parameter's own
                where None.

        Raises:
            TypeError, ValueError: no such parameter, not quantised yet, or tensors that do not fit each other.

        A parameter that bitsandbytes has repacked for its CPU kernel is read through bitsandbytes' own inverse, which
        cannot undo that its absmax was rounded to bf16; the parameter stays as it is.
        """
        from .bitsandbytes import read

        return read(weight, state)

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        *,
        checkpoint_format: str = "gptq",
    ) -> QuantizedWeight:
        """Of GPTQ's tensors in 4 bits: W[n, k] = scales[g, n] · (q[k, n] - z[g, n]) with g = g_idx[k].

        Args:
            qweight: int32 [K / 8, N], the q's of eight rows in a word.
            qzeros: int32 [G, N / 8], the z's of eight columns in a word.
            scales: fp16, bf16 or fp32 [G, N].
            g_idx: int32 or int64 [K] from -G to G - 1, in any order (act-order); None: G equal groups. Unequal groups
                are split into equal ones of at least 8.
            checkpoint_format: "gptq" stores zeros less one, "gptq_v2" as they are.

        Raises:
            TypeError, ValueError: a tensor of the wrong dtype or shape, a NaN among the scales, groups that do not fit.
        """
        from .gptq import read

        return read(qweight, qzeros, scales, g_idx, checkpoint_format)

    @classmethod
    def from_awq(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedWeight:
        """Of AutoAWQ's tensors (its "GEMM" layout) in 4 bits: W[n, k] = scales[g, n] · (q[k, n] - z[g, n]).

        Args:
            qweight: int32 [K, N / 8], the q's of eight columns in a word, in AWQ's order.
            qzeros: int32 [G, N / 8], the z's likewise.
            scales: fp16, bf16 or fp32 [G, N]; G divides K.

        Raises:
            TypeError, ValueError: a tensor of the wrong dtype or shape, a NaN among the scales.
        """
        from .awq import read

        return read(qweight, qzeros, scales)

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, Tensor], prefix: str = "", *, checkpoint_format: str = "gptq"
    ) -> QuantizedWeight:
        """Of a layer's tensors by its format's own keys, as :meth:`state_dict` gives them or a checkpoint holds them.

        Args:
            tensors: a checkpoint's tensors by name; those of other layers are left alone.
            prefix: the layer's name with a dot after it.
            checkpoint_format: as :meth:`from_gptq` takes it; the tensors themselves do not say.

        Raises:
            TypeError, ValueError: the keys are of no known format, one is missing or too many, or a tensor does not
                fit; it is named.
        """
        from .checkpoint import read

        return read(tensors, prefix, checkpoint_format)

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors of the format it came in by that format's own keys, bit for bit; to be saved as safetensors."""
        if self.origin is None:
            N, K = self.shape
            raise ValueError(f"this {self.fmt} weight [{N}, {K}] has no format of its own; GPTQ's takes multiples of 8")
        return {prefix + name: tensor for name, tensor in self.origin.tensors(self).items()}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """:func:`lora_kernels.dequantize` of it."""
        from ..ops.quantized import dequantize

        return dequantize(self, dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on a device; itself where it is there."""
        device = torch.device(device)
        if device == self.codes.device:
            return self
        moved = [None if t is None else t.to(device) for t in (self.offsets, self.table, self.order)]
        return QuantizedWeight(
            self.fmt, self.codes.to(device), self.scales.to(device), shape=(self.shape[0], self.shape[1]),
            group_size=self.group_size, dtype=self.dtype, offsets=moved[0], table=moved[1], order=moved[2],
            origin=None if self.origin is None else self.origin.to(device),
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """(codes, scales, offsets, table, group_size), as the ops take them."""
        return self.codes, self.scales, self.offsets, self.table, self.group_size

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors, what only its format needs left out."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.offsets, self.table, self.order) if t is not None)

    def __repr__(self) -> str:
        N, K = self.shape
        bytes_each = self.nbytes / max(N * K, 1)
        return (
            f"QuantizedWeight({self.fmt}, [{N}, {K}], group_size={self.group_size}, {bytes_each:.3f} bytes a number, "
            f"{self.device})"
        )
