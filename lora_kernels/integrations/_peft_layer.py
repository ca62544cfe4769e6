"""The class of a patched PEFT LoRA layer: the fast forward where it can run, PEFT's own where that must run."""

from __future__ import annotations

import functools
import logging
from typing import Any

from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..ops._dispatch import Op, forced_backend
from ..ops._low_rank import lora_add_
from ..select import choose
from ._peft_batch import NAMES
from ._peft_forward import forward as _forward
from ._peft_packed import restore
from ._peft_reason import slow_reason
from ._peft_state import forget, repeat

logger = logging.getLogger("lora_kernels")


class FusedMixin:
    """PEFT's LoRA ``Linear`` with a fast forward: no parameter or buffer of its own, nothing in the state dict."""

    def forward(self, x: Tensor, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Tensor:
        """PEFT's ``forward``: the same results, errors and dtype."""
        if adapter_names is None:
            adapter_names = self.__dict__.get(NAMES)
        refusal = None
        if not (args or kwargs):
            try:
                on_gpu = type(x) is Tensor and x.is_cuda
                y = None if on_gpu or is_dynamo_compiling() else repeat(self, x, adapter_names)
                if y is None:
                    y = _forward(self, x, adapter_names)
                if y is not None:
                    return y
            except (RuntimeError, TypeError, ValueError, KeyError) as error:
                if _forced_in_vain(x):
                    raise
                refusal = f"{type(error).__name__}: {error}"
        if adapter_names is not None:  # not every class of PEFT's takes them
            kwargs["adapter_names"] = adapter_names
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if refusal is not None and slow_reason(self, x) is None:
            _warn_once(refusal)
        return y

    forward.takes_names = True  # type: ignore[attr-defined]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``Module._apply``, as ``to`` and its kin call it; the states let go of the weights."""
        forget(self)  # type: ignore[arg-type]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's, which writes weights without a trace; the states let go of what they know of them."""
        restore(self.base_layer)  # type: ignore[attr-defined]
        super().merge(*args, **kwargs)  # type: ignore[misc]
        forget(self)  # type: ignore[arg-type]

    def unmerge(self) -> None:
        """PEFT's, as :meth:`merge`."""
        restore(self.base_layer)  # type: ignore[attr-defined]
        super().unmerge()  # type: ignore[misc]
        forget(self)  # type: ignore[arg-type]

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; the states let go of the adapter's weights."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        forget(self)  # type: ignore[arg-type]


class FusedLinear(FusedMixin, PeftLinear):
    """What a plain ``peft.tuners.lora.Linear`` becomes."""


@functools.lru_cache(maxsize=64)
def _warn_once(refusal: str) -> None:
    logger.warning("a patched layer ran PEFT's own forward, which took what the kernels refused: %s", refusal)


def _forced_in_vain(x: Any, op: Op = lora_add_) -> bool:
    forced = forced_backend()
    return forced is not None and choose(x.device.type, op.backends(), forced).backend is None
