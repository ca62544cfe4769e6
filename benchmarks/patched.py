"""What ``lora_kernels.patch`` makes fast, for the README: each row is asked of a small PEFT model, or of the tables
that the patch decides by."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import config as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from report import Table
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.integrations._peft_state import look
from lora_kernels.integrations.peft import FAST, tuners

NAMED = "adapter 'default': "
TARGETS = {"target_modules": ["proj"], "r": 4}


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.proj = layer
        self.prepare_inputs_for_generation: Any = None  # which PEFT asks causal language models for


def patched(
    base: nn.Module | None = None, change: Callable[[Any], object] | None = None, names: Any = None, **config: Any
) -> str:
    """What a layer of the patched model runs, in training, with gradients.

    Args:
        base: the layer, by default a linear one.
        change: done to the patched layer.
        names: the adapters of a mixed batch.
        config: of LoRA.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(One(base or nn.Linear(16, 24)), LoraConfig(**TARGETS, **config))
        if change is not None or names is not None:
            model.add_adapter("other", LoraConfig(**TARGETS, kasa_config=config.get("kasa_config")))
    handle = lk.patch(model.train())
    layer = model.base_model.model.proj
    if change is not None:
        change(layer)
    if names is not None:
        return FAST if look(layer, names, []) is not None else "PEFT's own forward"
    return runs(handle.report().layers["base_model.model.proj"])


def runs(reason: str) -> str:
    """A report's reason as the table says it."""
    return reason if reason.startswith(FAST) else f"PEFT's own forward: {reason.removeprefix(NAMED)}"


def autocast(dtype: torch.dtype) -> str:
    with torch.autocast("cpu", dtype):
        return patched()


def features() -> dict[str, str]:
    """What is done with LoRA, and what a layer then runs."""
    both = ("default", "other")
    return {
        "LoRA, rsLoRA, any initialisation": patched(use_rslora=True, init_lora_weights="gaussian"),
        "with dropout": patched(lora_dropout=0.1),
        "with a bias of its own": patched(lora_bias=True),
        "fp32 adapters over a bf16 model": patched(nn.Linear(16, 24).bfloat16()),
        "under autocast": autocast(torch.bfloat16),
        "several active adapters": patched(change=lambda layer: layer.set_adapter(list(both))),
        "a mixed batch (`adapter_names`)": patched(names=both),
        "a mixed batch, with dropout": patched(names=both[:1], lora_dropout=0.1),
        "over transformers' `Conv1D`": patched(Conv1D(24, 16), fan_in_fan_out=True),
        "over a trained base weight": patched(change=lambda layer: layer.base_layer.weight.requires_grad_()),
        "over a base layer with hooks": patched(change=lambda layer: hook(layer.base_layer)),
        "hooks on `lora_A`, `lora_B` or the dropout": patched(change=lambda layer: hook(layer.lora_A["default"])),
        "DoRA": patched(use_dora=True),
        "DoRA, with dropout": patched(use_dora=True, lora_dropout=0.1),
        "DoRA beside other active adapters": patched(change=lambda layer: layer.set_adapter(list(both)), use_dora=True),
        "DoRA in a mixed batch": patched(names=both[:1], use_dora=True),
        "KaSA": patched(kasa_config=lora.KasaConfig()),
        "MiCA, also in a mixed batch": patched(names=both, init_lora_weights="mica"),
        "KaSA in a mixed batch": patched(names=both[:1], kasa_config=lora.KasaConfig()),
        "BD-LoRA": patched(use_bdlora=lora.BdLoraConfig(["proj"], [], nblocks=2)),
        "aLoRA": patched(task_type="CAUSAL_LM", alora_invocation_tokens=[1]),
        "VeLoRA": patched(velora_config=lora.VeloraConfig(num_groups=4, init_type="batch_average")),
        "MonteCLoRA": patched(monteclora_config=lora.MontecloraConfig()),
        "LoRA over an embedding": patched(nn.Embedding(16, 24)),
        "LoRA over a convolution": patched(nn.Conv2d(4, 4, 3)),
    }


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


@contextlib.contextmanager
def quiet_logger() -> Iterator[None]:
    """Without the warnings that no layer runs fast, which is what some rows ask."""
    logger = logging.getLogger("lora_kernels")
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def tables() -> list[Table]:
    """LoRA by what is done with it, and PEFT's other tuners; the same on each machine."""
    with lk.backend("reference"), quiet_logger():
        done = list(features().items())
    mine = tuners()
    known = {module for module, _, _ in mine}
    others = sorted(
        name.value
        for name, cls in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.items()
        if issubclass(getattr(cls, "tuner_layer_cls", None) or object, BaseTunerLayer)
        and cls.__module__.split(".")[-2] not in {"lora", *known}
    )
    rows = [*([f"{tuner}", f"`{formula}`", FAST] for _, tuner, formula in mine)]
    rows.append([", ".join(others), "", runs("not patched")])
    return [
        Table(f"PEFT {peft.__version__}, LoRA", ["LoRA", "a layer runs"], done),
        Table("PEFT's other tuners, with one active adapter", ["tuner", "adds", "a layer runs"], rows),
    ]
