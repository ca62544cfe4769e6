"""LoRA in vLLM by the kernels of this package: a plug-in that vLLM finds by itself where both are installed.

vLLM computes LoRA in a *Punica wrapper*, a class that its platform names. :func:`register`, the entry point in the
group ``vllm.general_plugins``, makes the platform name ours (``_vllm_wrapper.py``), has every layer tell it of its
factors, so that live ranks are known, and has adapters read and checked before they take a slot (``_vllm_loading.py``).
``LORA_KERNELS_VLLM=0`` switches it off.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from .. import _env
from .._version import __version__
from ..ops._dispatch import cuda_architectures, extension_error, has_triton

logger = logging.getLogger("lora_kernels")

#: Versions whose wrapper, layers and manager are as this plug-in takes them to be.
KNOWN = ("0.31", "0.32", "0.33")

_OURS = {
    "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU": f"{__package__}._vllm_wrapper.LoRAKernelsCPU",
    "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU": f"{__package__}._vllm_wrapper.LoRAKernelsGPU",
}


def register() -> None:
    """Have vLLM compute LoRA with this package, in this process; again changes nothing.

    vLLM is left as it is where ``LORA_KERNELS_VLLM=0``, and, with a warning, where its version is none of
    :data:`KNOWN` or this machine lacks our kernels. So is a platform that is neither a CPU nor CUDA nor ROCm.
    """
    if not _env.vllm():
        return
    import vllm
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        return
    theirs = current_platform.get_punica_wrapper()
    if theirs not in _OURS:
        return
    if (why := _why_not(vllm.__version__, current_platform.is_cpu())) is not None:
        _say_left_alone(why)
        return
    try:
        from ._vllm_loading import install

        install()
        _adopt_layers()
        _sign_graphs()
    except (ImportError, AttributeError) as error:  # a build of a known version that lacks what the version has
        _say_left_alone(str(error))
        return
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: _OURS[theirs])


def _why_not(version: str, cpu: bool) -> str | None:
    """Why vLLM keeps its own LoRA here, or None."""
    if ".".join(version.split(".")[:2]) not in KNOWN:
        return f"its version {version} is not one of {', '.join(f'{v}.x' for v in KNOWN)}"
    if cpu and extension_error is not None:
        return f"the compiled CPU kernels are missing: {extension_error}"
    if not cpu and not has_triton("low_rank") and not (torch.version.cuda and cuda_architectures()):
        return "there is neither Triton nor a compiled CUDA kernel"
    return None


@functools.cache
def _say_left_alone(why: str) -> None:
    logger.warning("vLLM keeps its own LoRA kernels: %s", why)


def _adopt_layers() -> None:
    """Have layers show themselves to a wrapper of ours when they are given it."""
    from vllm.lora.layers.base import BaseLayerWithLoRA

    original = BaseLayerWithLoRA.set_mapping

    @functools.wraps(original)
    def set_mapping(layer: Any, wrapper: Any) -> None:
        original(layer, wrapper)
        if hasattr(wrapper, "adopt"):
            wrapper.adopt(layer)

    BaseLayerWithLoRA.set_mapping = set_mapping


def _sign_graphs() -> None:
    """Keep graphs that vLLM has compiled and cached without these ops from being loaded with them, and the reverse."""
    from vllm.config import LoRAConfig

    original = LoRAConfig.compute_hash
    LoRAConfig.compute_hash = lambda self: f"{original(self)}-lora_kernels-{__version__}"
