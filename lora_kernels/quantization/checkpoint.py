"""Which format a layer's tensors are in, by their keys and shapes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import awq, bitsandbytes, gptq
from .fields import expect, only, shape
from .packing import WORD
from .weight import QuantizedWeight


def read(tensors: Mapping[str, Tensor], prefix: str, checkpoint_format: str) -> QuantizedWeight:
    """See :meth:`QuantizedWeight.from_state_dict`."""
    own = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    own = {name: t for name, t in own.items() if name.startswith("weight.") or ("." not in name and name != "bias")}
    if "qweight" in own:
        return _groups(own, prefix, checkpoint_format)
    if "SCB" in own:
        return bitsandbytes.rows(own, prefix)
    if any(name.startswith("weight.") for name in own):
        return bitsandbytes.blocks(own, prefix)
    raise ValueError(
        f"{prefix!r} has no tensors of bitsandbytes, GPTQ or AWQ: {', '.join(sorted(own)) or 'none'} of "
        f"{len(tensors)} tensors"
    )


def _groups(own: Mapping[str, Tensor], prefix: str, checkpoint_format: str) -> QuantizedWeight:
    """GPTQ packs along K, so its qweight has a column for each one of scales; AWQ along N."""
    only(own, ("qweight", "qzeros", "scales"), ("g_idx",), prefix, "a GPTQ or AWQ weight")
    qweight, scales = own["qweight"], own["scales"]
    for name, t in (("qweight", qweight), ("scales", scales)):
        expect(prefix + name, t, (t.dtype,), ("rows", "columns"))
    if qweight.shape[1] != scales.shape[1] and qweight.shape[1] * WORD != scales.shape[1]:
        raise ValueError(
            f"{prefix}qweight {shape(qweight)} must have as many columns as scales {shape(scales)} (GPTQ), or an "
            "eighth (AWQ)"
        )
    if qweight.shape[1] != scales.shape[1]:
        only(own, ("qweight", "qzeros", "scales"), (), prefix, "an AWQ weight")
        return awq.read(qweight, own["qzeros"], scales, prefix)
    return gptq.read(qweight, own["qzeros"], scales, own.get("g_idx"), checkpoint_format, prefix)
