"""vLLM's Punica wrappers, on the CPU and on GPUs, with the ops of this package inside.

A wrapper is asked by every layer with LoRA to add its adapters' part to what the base layer gave. Slots are vLLM's word
for the L places that loaded adapters have in each layer's stacks of factors, ``[L, 1, R, K]`` and ``[L, 1, N, R]``,
padded with zeros to the engine's ``max_lora_rank``. Scaling is in B already.

The methods run under vLLM's ``torch.compile`` and in captured graphs: what changes from step to step is read by the ops
from tensors at fixed addresses. What is not covered (mixture-of-experts layers, adapters in another dtype than the
model) is vLLM's own code, inherited.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from vllm.lora.layers import (
    ClassificationHeadWithLoRA,
    LogitsProcessorWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.model_executor.custom_op import maybe_get_oot_by_class
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from ..ops._dispatch import forced_backend
from ..ops._low_rank import lora_add_
from ..ops.low_rank import bgmv, bgmv_expand, bgmv_shrink
from ..plan import BatchPlan

MOST_LABELS = 512  # the ops' greatest rank
KEPT_AS = "lora_kernels_stack"  # an attribute of the first tensor of a stack


class Stack:
    """The factors of one kind, A or B, that a layer keeps for all slots, and how many of their ranks are in use.

    Attributes:
        factors: S tensors, ``[L, R, K]`` or ``[L, N, R]``, views of vLLM's.
        ranks: int32 ``[S, L]`` on their device: past it a slot holds zeros, 0 = it has no adapter here.
        fitted: the factors up to the highest rank in use, see :func:`fit`.
    """

    def __init__(self, stacked: tuple[Tensor, ...], rank_dim: int):
        self.factors = self.fitted = tuple(t.squeeze(1) if t.dim() == 4 else t for t in stacked)
        self.rank_dim = rank_dim  # of one slot's matrix
        first = self.factors[0]
        self.ranks = torch.zeros(len(stacked), first.shape[0], dtype=torch.int32, device=first.device)
        self.max_rank = first.shape[1 + rank_dim]
        self._slots: set[int] = set()

    @property
    def empty(self) -> bool:
        """Whether no slot has an adapter here."""
        return not self._slots

    def learn(self, slot: int) -> None:
        """Read off what an adapter has put in a slot how far it is in use; on a GPU without a synchronisation."""
        self._slots.add(slot)
        # Made anew each time: what is kept on a GPU beside a model is lost when vLLM sleeps.
        order = torch.arange(1, self.max_rank + 1, dtype=torch.int32, device=self.ranks.device)
        for s, factor in enumerate(self.factors):
            in_use = (factor[slot] != 0).any(dim=1 - self.rank_dim)
            self.ranks[s, slot] = (order * in_use).amax()

    def forget(self, slot: int) -> None:
        """The slot is empty."""
        self._slots.discard(slot)
        self.ranks[:, slot] = 0


def fit(a: Stack, b: Stack, slot: int) -> None:
    """Have what is in use of B lie together, on the CPU: of a long row every cache line is read for a short part of it.

    Copies of all slots are made where the highest rank has changed, else of ``slot``, whose adapter is new.
    """
    live = max(int(a.ranks.max()), int(b.ranks.max()), 1)
    width = min(1 << (live - 1).bit_length(), b.max_rank)
    if width == b.max_rank:
        a.fitted, b.fitted = a.factors, b.factors
    elif width != b.fitted[0].shape[2]:
        a.fitted = tuple(t[:, :width] for t in a.factors)
        b.fitted = tuple(t[:, :, :width].contiguous() for t in b.factors)
    else:
        for own, factor in zip(b.fitted, b.factors, strict=True):
            own[slot] = factor[slot, :, :width]


def stack_of(stacked: tuple[Tensor, ...] | Tensor) -> Stack | None:
    """The :class:`Stack` of a layer's factors as vLLM hands them over; None where the layer is not ours."""
    first = stacked if isinstance(stacked, Tensor) else stacked[0]
    return getattr(first, KEPT_AS, None)


def add(y: Tensor, x: Tensor, a: Stack, b: Stack, plan: BatchPlan, scale: float) -> None:
    """:func:`bgmv` with little Python around it on the CPU, where a layer's share of a token is a few microseconds."""
    native = None if is_compiling() or forced_backend() is not None else lora_add_.native
    if native is None or not native(y, x, a.fitted, b.fitted, None, None, plan.table, None, a.ranks, None, scale):
        bgmv(y, x, a.factors, b.factors, plan, scaling=scale, ranks=a.ranks)


class _Kernels:
    """What both wrappers do; a class of vLLM's comes after it."""

    # vLLM's:
    token_lora_indices: Tensor
    sampler_indices: Tensor
    _update_base_metadata: Any
    _select_full_linear_output: Any

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)  # type: ignore[call-arg]
        slots = kwargs["lora_config"].max_loras
        #: The tokens of a step by slot, and the rows of its logits; built once a step, taken by every layer.
        self.tokens = BatchPlan.empty(max_num_batched_tokens, slots, device)
        self.samples = BatchPlan.empty(max_num_batched_tokens, slots, device)
        #: Whether no row of the step has an adapter; for eager steps only.
        self.idle = True
        #: Whether a layer needs vLLM's own kernels, and these their metadata.
        self.mixed = False

    def adopt(self, layer: Any) -> None:
        """Know the factors of a layer and how far each slot is in use from now on."""
        if not _is_covered(layer):
            self.mixed = True
            return
        if stack_of(layer.lora_b_stacked) is not None:  # it has been given another wrapper before
            return
        stacks = []
        for name, rank_dim in (("lora_a_stacked", 0), ("lora_b_stacked", 1)):
            if name == "lora_a_stacked" and isinstance(layer, VocabParallelEmbeddingWithLoRA):
                continue  # vLLM looks A up itself
            stacked = getattr(layer, name)
            stacked = (stacked,) if isinstance(stacked, Tensor) else stacked
            stacks.append(Stack(stacked, rank_dim))
            setattr(stacked[0], KEPT_AS, stacks[-1])
        set_lora, reset_lora = layer.set_lora, layer.reset_lora
        on_cpu = stacks[0].ranks.is_cpu
        fits = on_cpu and len(stacks) == 2 and stacks[0].max_rank == stacks[1].max_rank  # or the ranks are sharded

        def set_and_learn(index: int, lora_a: Any, lora_b: Any) -> None:
            set_lora(index, lora_a, lora_b)
            for stack in stacks:
                stack.learn(index)
            if fits:
                fit(stacks[0], stacks[1], index)

        def reset_and_forget(index: int) -> None:
            reset_lora(index)
            for stack in stacks:
                stack.forget(index)

        layer.set_lora, layer.reset_lora = set_and_learn, reset_and_forget

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """The rows of a new step."""
        if self.mixed:
            super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)  # type: ignore[misc]
        else:
            self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
            self.is_prefill = mapping.is_prefill
        self.tokens.update_(self.token_lora_indices)
        self.samples.update_(self.sampler_indices)
        self.idle = not (any(mapping.index_mapping) or any(mapping.prompt_mapping))
        self.no_lora = self.idle

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y += scale · (x Aᵀ) Bᵀ, slice by slice; into zeros where vLLM wants the adapters' part alone."""
        if not is_compiling() and self.idle:
            return
        a, b = stack_of(lora_a_stacked), stack_of(lora_b_stacked)
        if a is None or b is None:
            self._theirs().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
        elif is_compiling() or not a.empty:
            add(y, x, a, b, self.tokens, scale)

    def add_shrink(self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any) -> None:
        """y[s] += scale · x Aᵀ, fp32 [S, M, R], for layers whose ranks are sharded."""
        if not is_compiling() and self.idle:
            return
        a = stack_of(lora_a_stacked)
        if a is None or not isinstance(y, Tensor):
            self._theirs().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
        elif is_compiling() or not a.empty:
            y.add_(bgmv_shrink(x, a.factors, self.tokens, ranks=a.ranks), alpha=scale)

    def add_expand(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, offset_start:] += x[s] Bᵀ, slice by slice, for layers whose ranks are sharded."""
        if not is_compiling() and self.idle:
            return
        b = stack_of(lora_b_stacked)
        if b is None or not isinstance(x, Tensor) or not add_inputs:
            self._theirs().add_expand(y, x, lora_b_stacked, output_slices, offset_start, add_inputs, **kwargs)
        elif is_compiling() or not b.empty:
            part = y.narrow(-1, offset_start, sum(t.shape[1] for t in b.factors))
            bgmv_expand(part, x, b.factors, self.tokens, ranks=b.ranks)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y += x Bᵀ; x [M, R] are the rows of A that the tokens picked."""
        if not is_compiling() and self.idle:
            return
        b = stack_of(lora_b_stacked)
        if b is None or not add_inputs:
            self._theirs().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)
        elif is_compiling() or not b.empty:
            bgmv_expand(y, x.float().unsqueeze(0), b.factors, self.tokens, ranks=b.ranks)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **kwargs: Any
    ) -> None:
        """y += scale · (x Aᵀ) Bᵀ for the rows whose logits are wanted; y may be wider than B, by padding."""
        if not is_compiling() and self.idle:
            return
        a, b = stack_of(lora_a_stacked), stack_of(lora_b_stacked)
        if a is None or b is None:
            self._theirs().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs)
        elif is_compiling() or not a.empty:
            add(y.narrow(-1, 0, b.factors[0].shape[1]), x, a, b, self.samples, scale)

    def apply_lora_full_linear(
        self, y: Tensor, x: Tensor, weight_stacked: Tensor, bias_stacked: Tensor, module_enabled: Tensor
    ) -> None:
        """y = x Wᵀ + bias in the rows whose adapter brings a classification head W of its own."""
        if not is_compiling() and self.idle:
            return
        if weight_stacked.shape[2] > MOST_LABELS:
            self._theirs().apply_lora_full_linear(y, x, weight_stacked, bias_stacked, module_enabled)
        else:
            own = bgmv_shrink(x, weight_stacked, self.samples)[0]
            y.copy_(self._select_full_linear_output(y, own, bias_stacked, module_enabled))

    def _theirs(self) -> Any:
        """vLLM's wrapper below this one."""
        if not self.mixed:
            raise RuntimeError("a LoRA layer that was never given its wrapper asks for it: please report this")
        return super()


class LoRAKernelsCPU(_Kernels, PunicaWrapperCPU):
    """On the CPU: C++. Beside it Python counts, so layers that do nothing special get a shorter way through it."""

    def adopt(self, layer: Any) -> None:
        """As the other wrapper, and :func:`shorten`."""
        super().adopt(layer)
        if isinstance(layer, BaseLinearLayerWithLoRA):
            shorten(layer)


class LoRAKernelsGPU(_Kernels, PunicaWrapperGPU):
    """On CUDA and ROCm: Triton or CUDA C++."""


def shorten(layer: Any) -> None:
    """Have a layer with vLLM's plain ``apply`` compute the same in fewer frames of Python."""
    base = layer.base_layer
    # It is asked for eight times a forward, through a __getattr__ in Python.
    vars(layer)["base_layer"] = base
    apply = type(layer).apply
    if apply is MergedColumnParallelLinearWithLoRA.apply:  # plain, unless the base layer has a forward of its own
        plain = type(base).forward is maybe_get_oot_by_class(MergedColumnParallelLinear).forward
    else:
        plain = apply is BaseLinearLayerWithLoRA.apply
    if not plain or layer._enable_aux_cuda_stream or base.quant_method is None:
        return
    A, B, slices = layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices

    def applied(x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = base.quant_method.apply(base, x, bias)
        if y.dim() == 3:
            flat = y.flatten(0, 1)  # a copy where y does not lie in rows
            layer.punica_wrapper.add_lora_linear(flat, x.flatten(0, 1), A, B, 1.0, slices)
            return flat.view(y.shape)
        layer.punica_wrapper.add_lora_linear(y, x, A, B, 1.0, slices)
        return y

    layer.apply = applied


def _is_covered(layer: Any) -> bool:
    """Whether the ops take what a layer will pass."""
    if not isinstance(layer, (BaseLinearLayerWithLoRA, VocabParallelEmbeddingWithLoRA, LogitsProcessorWithLoRA)):
        return False
    if isinstance(layer, ClassificationHeadWithLoRA) and layer.padded_num_labels > MOST_LABELS:
        return False
    stacked = layer.lora_a_stacked
    dtype = (stacked if isinstance(stacked, Tensor) else stacked[0]).dtype
    if isinstance(layer, LogitsProcessorWithLoRA):
        return layer.dtype == dtype
    return getattr(layer.base_layer, "params_dtype", dtype) == dtype
