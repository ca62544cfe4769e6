"""Other projects' kernels, timed beside ours by ``gpu_low_rank.py --peers FOLDER``.

FOLDER holds their Python files as their package has them, and need not hold more than

    vllm/lora/ops/triton_ops/               vLLM 0.33
    sglang/kernels/ops/lora/dense/          SGLang 0.5.23

copied from an installed package, from a wheel (``pip download sglang --no-deps``, then ``unzip``), or from a source
distribution (``TMPDIR=$PWD pip download vllm --no-deps --no-binary vllm --no-build-isolation --no-clean`` leaves it
unpacked). What else of the package these files import is a few settings and helpers, for which there are stand-ins
here; where the package itself is installed, it is imported instead.

A peer is a function of a case that prepares what its engine prepares once a step or at load time, outside what is
timed, and returns the call that is timed; or None for a case it is not timed in.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from gpu_case import Call, Case

Peer = Callable[[Case], Call | None]


def load(folder: Path) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers by name, and for those that can't be had the reason."""
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            found[name] = make(folder.resolve())
        except Exception as error:
            missing[name] = reason(error).replace(str(folder.resolve()), "the folder")
    return found, missing


def reason(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def vllm(folder: Path) -> Peer:
    """Shrink with split K, expand into y; the default configuration, which is what runs without a tuned one.

    The weights are ``[L, 1, R, K]`` and ``[L, 1, N, R]``, padded with zeros; there is no way to tell it live ranks.
    """
    name = "vllm.lora.ops.triton_ops"
    stand_in(folder, name, lambda: {
        "vllm.envs": {
            "VLLM_BATCH_INVARIANT": False, "VLLM_LORA_DISABLE_PDL": False, "VLLM_LORA_ENABLE_DUAL_STREAM": False,
            "VLLM_TUNED_CONFIG_FOLDER": None,
        },
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(info_once=silent, warning_once=silent)},
        "vllm.platforms": {"current_platform": SimpleNamespace(
            is_cuda=torch.cuda.is_available,
            has_device_capability=lambda least: capability() >= least,
            is_device_capability=lambda one: capability() == one,
        )},
        "vllm.triton_utils": {
            "triton": importlib.import_module("triton"), "tl": importlib.import_module("triton.language"),
        },
        "vllm.utils.math_utils": {"next_power_of_2": lambda n: 1 << (n - 1).bit_length()},
        "vllm.utils.torch_utils": {
            "async_tensor_h2d": lambda data, dtype, device: torch.tensor(data, dtype=dtype).to(device),
            "direct_register_custom_op": not_registered,
        },
    })  # fmt: skip
    files = ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata", "utils")
    shrink, expand, metadata, utils = (importlib.import_module(f"{name}.{file}") for file in files)

    def bind(case: Case) -> Call:
        # Tables of pointers and strides are kept by address alone, and this case's addresses were another's before.
        utils._LORA_A_PTR_DICT.clear()
        utils._LORA_B_PTR_DICT.clear()
        meta = metadata.LoRAKernelMeta.make(case.adapters, case.rows, case.x.device)
        meta.prepare_tensors(case.ids)
        step = meta.meta_args(case.rows, False)
        A, B = ([[factor[:, None] for factor in layer] for layer in factors] for factors in (case.A, case.B))
        size = (len(A[0]), case.rows, case.padded_rank)
        v = torch.empty(size, dtype=torch.float32, device=case.x.device)

        def call(i: int) -> None:
            shrink.lora_shrink(case.x, A[i], v, *step, 1.0)
            expand.lora_expand(v, B[i], case.y[i], *step, offset_start=0, add_inputs=True)

        return call

    return bind


def sglang(folder: Path) -> Peer:
    """``csgmv``, its default backend: shrink and expand over segments of up to 16 rows, its default, of one adapter.

    The weights are ``[L, slices * R, K]``, where an adapter of a lower rank has its slices one after the other, and
    ``[L, sum of N, R]``. Each shape compiles anew, so it is timed in two layers only.
    """
    off = SimpleNamespace(get=lambda: False)
    name = "sglang.kernels.ops.lora.dense"
    stand_in(folder, name, lambda: {
        "sglang.srt.environ": {"envs": SimpleNamespace(
            SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off,
        )},
        "sglang.srt.lora.utils": {"LoRABatchInfo": SimpleNamespace},
        "sglang.srt.utils": {
            "cached_triton_kernel": lambda key: lambda kernel: kernel,
            "get_device_name": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
    })  # fmt: skip
    files = ("chunked_sgmv_shrink", "chunked_sgmv_expand")
    shrink, expand = (importlib.import_module(f"{name}.{file}") for file in files)
    chunk = 16

    def bind(case: Case) -> Call | None:
        if case.site not in ("o", "gate_up"):
            return None
        segments = [(at, min(at + chunk, stop + 1), l) for l, (start, stop) in enumerate(case.bounds)
                    for at in range(start, stop + 1, chunk)]  # fmt: skip
        int32 = lambda values: torch.tensor(values, dtype=torch.int32, device=case.x.device)  # noqa: E731
        info = SimpleNamespace(
            use_cuda_graph=False,  # as many programs as there are segments, not as there might be
            num_segments=len(segments),
            max_len=chunk,
            seg_indptr=int32([0, *(stop for _, stop, _ in segments)]),
            weight_indices=int32([l for _, _, l in segments]),
            permutation=int32(list(range(case.rows))),
            lora_ranks=int32(case.live),
            scalings=torch.ones(case.adapters, device=case.x.device),
        )
        A = [packed(layer, case.live) for layer in case.A]
        B = [torch.cat(layer, dim=1) for layer in case.B]
        widths = [factor.shape[1] for factor in case.B[0]]
        ends = torch.tensor([0, *widths]).cumsum(0)
        offsets = int32(ends.tolist())

        def call(i: int) -> None:
            v = shrink.chunked_sgmv_lora_shrink_forward(case.x, A[i], info, len(widths))
            expand.chunked_sgmv_lora_expand_forward(v, B[i], info, offsets, max(widths), case.y[i], ends)

        return call

    return bind


PEERS = {"vLLM": vllm, "SGLang csgmv": sglang}


def stand_in(folder: Path, name: str, content: Callable[[], dict[str, dict[str, Any]]]) -> None:
    """Makes the modules of the package ``name`` importable from ``folder``, beside modules with ``content``.

    No ``__init__.py`` runs: those of ``name`` and of what it is in import the whole engine.
    """
    top = name.partition(".")[0]
    if (sys.modules[top].__spec__ if top in sys.modules else importlib.util.find_spec(top)) is not None:
        return
    if not folder.joinpath(*name.split(".")).is_dir():
        raise FileNotFoundError(f"no {name.replace('.', '/')} in the folder")
    modules = content()
    for path in (name, *modules):
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:i]))
            module.__path__ = [str(folder.joinpath(*parts[:i]))]
            sys.modules.setdefault(module.__name__, module)
    for path, names in modules.items():
        sys.modules[path].__dict__.update(names)


def capability() -> int:
    """90 on an H100."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def silent(*_: object) -> None:
    pass


def not_registered(**_: object) -> None:
    """What makes these files use their functions as they are, without an operator of torch around them."""
    raise AttributeError


def packed(factors: tuple[torch.Tensor, ...], live: list[int]) -> torch.Tensor:
    """``[L, R, K]`` of each slice as ``[L, slices * R, K]``, the slices of adapter l every ``live[l]`` rows."""
    out = torch.cat(factors, dim=1).zero_()
    for l, r in enumerate(live):
        for s, factor in enumerate(factors):
            out[l, s * r : (s + 1) * r] = factor[l, :r]
    return out
