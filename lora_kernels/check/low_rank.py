"""The calls of the ``low_rank`` family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_kernels as lk

from ..testing import (
    LOW_RANK_DTYPES,
    Sample,
    as_segments,
    low_rank_oracle,
    low_rank_plain,
    low_rank_samples,
    low_rank_terms,
    rms,
    shrink_oracle,
)
from .calls import Call, Family, Want, to

QUICK = (
    "no-rows", "one-row", "odd", "decode", "m33", "r100", "live-ranks", "gate-up-live-ranks", "listed-live-ranks",
    "strided", "mixture-of-3", "nan-rows",
)  # fmt: skip
# lora_linear adds to a base that torch has rounded: of fewer outputs than these the RMS error is a matter of luck.
FEWEST = 256


def _samples(dtypes: str, full: bool) -> list[Sample]:
    return [s for s in low_rank_samples(*LOW_RANK_DTYPES[dtypes]) if full or s.name in QUICK]


def _calls(sample: Sample) -> Iterator[Call]:
    def arguments(device: str) -> dict[str, Any]:
        return {name: to(value, device) for name, value in sample.make(0).items()}

    def bgmv(device: str) -> dict[str, Tensor]:
        return {"y": lk.bgmv(**arguments(device))}

    def sgmv(device: str) -> dict[str, Tensor]:
        a = arguments(device)
        segments = to(as_segments(a.pop("adapter_ids")), device)
        return {"y": lk.sgmv(a["y"], a["x"], a["A"], a["B"], *segments, scaling=a["scaling"], ranks=a["ranks"])}

    def shrink(device: str) -> dict[str, Tensor]:
        a = arguments(device)
        return {"v": lk.bgmv_shrink(a["x"], a["A"], a["adapter_ids"], ranks=a["ranks"])}

    def expand(device: str) -> dict[str, Tensor]:
        a = arguments(device)
        options = {name: a[name] for name in ("scaling", "ranks")}
        return {"y": lk.bgmv_expand(a["y"], v.oracle.float().to(device), a["B"], a["adapter_ids"], **options)}

    def functional(device: str) -> dict[str, Tensor]:
        return {"y": lk.multi_lora(**arguments(device))}

    def backward(device: str) -> dict[str, Tensor]:
        return _gradients(lk.multi_lora, arguments(device), dy.to(device))

    a = sample.make(0)
    noise = a["x"].shape[-1] ** 0.5 * 2**-24 * low_rank_terms(**a)
    y = Want(low_rank_oracle(**a), low_rank_plain(**a), noise)
    yield Call("bgmv", bgmv, {"y": y})
    yield Call("multi_lora", functional, {"y": y})
    if "mixture" not in sample.traits:
        v = _want_shrink(a)
        yield Call("sgmv", sgmv, {"y": y})
        yield Call("bgmv_shrink", shrink, {"v": v})
        yield Call("bgmv_expand", expand, {"y": y})
        yield from _linear_call(a)
    if "nan" not in sample.traits:
        dy = torch.randn(a["y"].shape, generator=torch.Generator().manual_seed(1)).to(a["y"].dtype)
        yield Call("multi_lora backward", backward, _want_gradients(sample, dy))


def _want_shrink(a: dict[str, Any]) -> Want:
    options = {name: a[name] for name in ("adapter_ids", "ranks")}
    A = [a["A"]] if isinstance(a["A"], Tensor) else a["A"]
    oracle = shrink_oracle(a["x"], A, **options)
    terms = shrink_oracle(a["x"].double() ** 2, [t.double() ** 2 for t in A], **options)
    noise = a["x"].shape[-1] ** 0.5 * 2**-24 * rms(terms[terms.isfinite()].sqrt())
    return Want(oracle, oracle.float(), noise)


def _linear_call(a: dict[str, Any]) -> Iterator[Call]:
    """lora_linear with the rows and the factors of the sample's last adapter, where they make such a layer."""
    stacked = isinstance(a["A"], Tensor)
    if not (stacked or isinstance(a["A"], list)) or a["y"].dtype != a["x"].dtype:
        return
    x = a["x"].reshape(-1, a["x"].shape[-1])[a["adapter_ids"] == len(a["A"]) - 1]
    A, B = a["A"][-1], a["B"][-1]
    if a["ranks"] is not None:
        live = int(a["ranks"].reshape(-1)[-1])
        A, B = A[:live], B[:, :live]
    if not A.shape[0] or len(x) * B.shape[0] < FEWEST or not A.isfinite().all() or not B.isfinite().all():
        return
    generator = torch.Generator().manual_seed(2)
    W = (torch.randn(B.shape[0], x.shape[1], generator=generator) / x.shape[1] ** 0.5).to(x.dtype)
    bias = torch.randn(B.shape[0], generator=generator).to(x.dtype)
    lora = {"x": x, "A": A[None], "B": B[None], "adapter_ids": x.new_zeros(len(x), dtype=torch.int64), "scaling": 0.7}

    def linear(device: str) -> dict[str, Tensor]:
        tensors = (to(t, device) for t in (x, W, A, B))
        return {"y": lk.lora_linear(*tensors, scaling=0.7, bias=to(bias, device))}

    base = F.linear(x.double(), W.double(), bias.double())
    squared = F.linear(x.double() ** 2, W.double() ** 2, bias.double() ** 2)
    noise = x.shape[1] ** 0.5 * 2**-24 * low_rank_terms(squared.sqrt(), **lora)
    want = Want(low_rank_oracle(base, **lora), low_rank_plain(F.linear(x, W, bias), **lora), noise)
    yield Call("lora_linear", linear, {"y": want})


def _want_gradients(sample: Sample, dy: Tensor) -> dict[str, Want]:
    """Of every differentiable argument; the gradients of the squared call are the sums of the squared terms."""

    def wide(value: Any, power: int) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(wide(entry, power) for entry in value)
        if isinstance(value, Tensor):
            return value.double() ** power if value.is_floating_point() else value
        return value**power if isinstance(value, float) else value

    def oracle(power: int) -> dict[str, Tensor]:
        a = {name: wide(value, power) for name, value in sample.make(0).items()}
        return _gradients(low_rank_oracle, a, dy.double() ** power)

    plain = _gradients(low_rank_plain, sample.make(0), dy)
    exact, squared = oracle(1), oracle(2)
    K = sample.make(0)["x"].shape[-1]
    length = max(K, dy.shape[-1], dy.numel() // dy.shape[-1])
    return {n: Want(exact[n], plain[n], length**0.5 * 2**-24 * rms(squared[n].sqrt())) for n in exact}


def _gradients(function: Callable[..., Tensor], a: dict[str, Any], dy: Tensor) -> dict[str, Tensor]:
    """The gradients of function(**a) by name, those of A and B numbered."""
    leaves = {name: a[name] for name in ("y", "x", "weights") if a[name] is not None}
    for name in ("A", "B"):
        parts = (a[name],) if isinstance(a[name], Tensor) else a[name]
        leaves |= {f"{name}[{i}]": t for i, t in enumerate(parts)}
    for t in leaves.values():
        t.requires_grad_()
    with torch.enable_grad():
        out = function(**a)
    grads = torch.autograd.grad(out, list(leaves.values()), dy.to(out.dtype), materialize_grads=True)
    return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


LOW_RANK = Family(
    tuple(LOW_RANK_DTYPES),
    ("bgmv", "sgmv", "bgmv_shrink", "bgmv_expand", "multi_lora", "multi_lora backward", "lora_linear"),
    _samples,
    _calls,
)
