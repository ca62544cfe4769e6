"""PEFT adapters from their directories into one model, checked tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .model import first_line, quiet

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: the name it has in the model, what it does, and its directory in PEFT's format."""

    name: str
    what: str
    path: Path


def from_directories(paths: Sequence[Path]) -> list[Adapter]:
    """The user's own adapters, named after their directories; a name that comes again gets a number."""
    adapters: list[Adapter] = []
    for path in paths:
        stem = path.resolve().name.replace(".", "_")
        taken = {adapter.name for adapter in adapters}
        names = [stem, *(f"{stem}-{i}" for i in range(2, len(paths) + 1))]
        name = next(name for name in names if name not in taken)
        adapters.append(Adapter(name, str(path), path))
    return adapters


def attach(model: Any, adapters: Sequence[Adapter]) -> Any:
    """Put all ``adapters`` on ``model``, where it is, and return it as a ``PeftModel`` in eval mode.

    Raises:
        FileNotFoundError: a directory or a file in it is missing.
        ValueError: an adapter is no LoRA adapter or does not fit the model; tensors that are missing, left over,
            misshapen or not finite are named.
    """
    from peft import PeftModel

    configs = {adapter.name: _checked_config(adapter.path) for adapter in adapters}
    peft_model: Any = None
    with quiet():
        for adapter in adapters:
            try:
                if peft_model is None:
                    peft_model = PeftModel(
                        model, configs[adapter.name], adapter_name=adapter.name, low_cpu_mem_usage=True
                    )
                result = peft_model.load_adapter(
                    str(adapter.path), adapter_name=adapter.name, torch_device=str(model.device), low_cpu_mem_usage=True
                )
            except (RuntimeError, ValueError, TypeError, KeyError) as error:
                raise ValueError(f"adapter {adapter.path} does not fit the model: {first_line(error)}") from error
            if missing := [key for key in result.missing_keys if f".{adapter.name}." in key]:
                raise ValueError(f"adapter {adapter.path}: {WEIGHTS} lacks {_some(missing)}")
            if result.unexpected_keys:
                raise ValueError(f"adapter {adapter.path}: the model has no place for {_some(result.unexpected_keys)}")
    return peft_model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the adapter in ``path``, all finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"adapter {path}: {WEIGHTS} can't be read: {first_line(error)}") from error
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"adapter {path}: not finite: {_some(bad)}")
    return tensors


def _checked_config(path: Path) -> Any:
    from peft import PeftConfig

    if not path.is_dir():
        raise FileNotFoundError(f"adapter {path}: no such directory")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"adapter {path}: no {name} in it; adapters are read in PEFT's safetensors format")
    try:
        with quiet():
            config = PeftConfig.from_pretrained(str(path))
    except Exception as error:
        raise ValueError(f"adapter {path}: {CONFIG} can't be read: {first_line(error)}") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"adapter {path}: its peft_type is {kind}, and the demo shows LORA only")
    read_tensors(path)
    config.inference_mode = True
    return config


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
