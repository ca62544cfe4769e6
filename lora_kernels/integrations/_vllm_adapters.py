"""What an adapter must be before vLLM gives it a slot.

vLLM copies factors into its stacks without comparing sizes: smaller ones fill a part of their place, larger ones raise
with half of the modules done, and modules that the model does not have are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer

Size = int | None  # None: not known, and not checked


def check_adapter(adapter: Any, manager: Any) -> None:
    """Refuse an adapter that a model cannot serve as a whole.

    Args:
        adapter: the ``LoRAModel`` as it was read, its modules not packed yet.
        manager: the ``LoRAModelManager`` of the model.

    Raises:
        ValueError: it names the module, what is wrong with it and what was expected.
    """
    fault = next(_faults(adapter, manager), None)
    if fault is not None:
        raise ValueError(fault)


def _faults(adapter: Any, manager: Any) -> Iterator[str]:
    if not adapter.loras:
        yield "it has no LoRA tensors"
    sizes = dict(_sizes(manager))
    modules = dict(manager.model.named_modules())
    for name, lora in adapter.loras.items():
        missing = [kind for kind, t in (("lora_A", lora.lora_a), ("lora_B", lora.lora_b)) if t is None]
        if missing:
            yield f"{name}: {' and '.join(missing)} is missing"
        elif ".experts" not in name:  # their factors come in several layouts, which vLLM tells apart
            known = name if name in sizes or not manager.is_pooling_model else f"model.{name}"
            if known in sizes:
                yield from _misshapen(name, lora, *sizes[known], manager.lora_config.max_lora_rank)
            elif not _may_have(name, manager, modules):
                yield f"{name}: the model has no such module"
        if not missing:
            yield from _not_finite(f"{name}: lora_A", lora.lora_a, 1.0)
            yield from _not_finite(f"{name}: lora_B", lora.lora_b, lora.scaling)
    for name, full in adapter.modules_to_save.items():
        for kind, t in (("weight", full.weight), ("bias", full.bias)):
            if t is not None:
                yield from _not_finite(f"{name}: {kind}", t, 1.0)


def _misshapen(name: str, lora: Any, size_in: Size, size_out: Size, max_rank: int) -> Iterator[str]:
    a, b = list(lora.lora_a.shape), list(lora.lora_b.shape)
    if len(a) != 2 or a[1] != (size_in or a[1]):
        yield f"{name}: lora_A is {a}, not [rank, {size_in or 'input size'}]"
    elif len(b) != 2 or b[0] != (size_out or b[0]):
        yield f"{name}: lora_B is {b}, not [{size_out or 'output size'}, rank]"
    elif a[0] != b[1]:
        yield f"{name}: lora_A has rank {a[0]} and lora_B {b[1]}"
    elif not 1 <= a[0] <= max_rank:
        yield f"{name}: rank {a[0]} is not within max_lora_rank {max_rank}"


def _not_finite(what: str, t: Tensor, scaling: float) -> Iterator[str]:
    low, high = t.aminmax()
    if not max(-low.item(), high.item()) * abs(scaling) <= torch.finfo(t.dtype).max:
        times = f" times {scaling:g}" if scaling != 1 else ""
        yield f"{what} has values that are not finite in {t.dtype}{times}"


def _sizes(manager: Any) -> Iterator[tuple[str, tuple[Size, Size]]]:
    """Input and output size, before sharding, of each module that an adapter may name."""
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        size_in, sizes_out = _full_sizes(layer, manager.vocab_size)
        if len(parts) == 1 and None not in sizes_out:
            sizes_out = [sum(sizes_out)]
        if len(parts) != len(sizes_out):
            sizes_out = [None] * len(parts)
        for part, size_out in zip(parts, sizes_out, strict=True):
            yield part, (size_in, size_out)


def _full_sizes(layer: Any, vocab: int) -> tuple[Size, list[Any]]:
    base = layer.base_layer
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        return vocab if vocab == base.org_vocab_size else None, [base.embedding_dim]
    if isinstance(layer, LogitsProcessorWithLoRA):
        return layer.hidden_size, [vocab if vocab == base.vocab_size else None]
    if not isinstance(layer, BaseLinearLayerWithLoRA):
        return None, [None]
    if isinstance(base, QKVParallelLinear):  # its output_sizes count the copies of heads that shards share
        kv = base.total_num_kv_heads
        return base.input_size, [base.total_num_heads * base.head_size, kv * base.head_size, kv * base.v_head_size]
    return base.input_size, list(getattr(base, "output_sizes", [base.output_size]))


def _may_have(name: str, manager: Any, modules: dict[str, Any]) -> bool:
    """Whether a module without LoRA in this process may be the model's all the same, in part or under another name."""
    if manager.supports_mm or manager.is_pooling_model or ".experts" in name:
        return True
    config = getattr(manager.model, "config", None)
    if getattr(config, "num_nextn_predict_layers", 0):  # of these layers an engine may load none
        return True
    names = [name]
    for packed, parts in manager.packed_modules_mapping.items():
        names += [name.removesuffix(part) + packed for part in parts if name.endswith(f".{part}")]
    if any(n in modules for n in names):
        return True
    while name not in modules:
        name = name.rpartition(".")[0]
    return isinstance(modules[name], PPMissingLayer)
