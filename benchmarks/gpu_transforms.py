"""Times of the transforms on a GPU beside a copy of the same rows, as JSON.

    python benchmarks/gpu_transforms.py --out DIR [--seconds S] [--dry-run]

A transform that reads its rows once and writes them once takes at least the time of a copy, so ``of_copy`` is that time
over its own. Each runs in a captured graph over several inputs, together larger than the cache. The result is checked
before it is timed. ``matmul_us`` is the dense way: a product with the matrix itself.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from gpu_low_rank import captured, machine, times
from torch import Tensor

import lora_kernels as lk
from lora_kernels.testing import TRANSFORM_FUNCTIONS, rms

LENGTHS = (4096, 8192, 14336, 5120, 3072, 16384, 1024, 11008, 28672, 128)  # the more telling first
OTHERS = (4096, 14336, 5120, 11008)  # of the functions but ``wht``
BYTES = 2**27  # of all inputs of a length: more than any cache
DENSE = 16384  # the largest matrix that is built


def right(function: str, y: Tensor, x: Tensor) -> None:
    """One rounding away from the transform in fp64, by the reference; an fp32 sum's own noise aside."""
    with lk.backend("reference"):
        want = getattr(lk, function)(x[:8].double())
    error, rounded = rms(y[:8].double() - want), rms(want.to(x.dtype).double() - want)
    if not error <= max(1.05 * rounded, 2**-22 * rms(want)):
        raise AssertionError(f"{function} of {x.shape[-1]}: error {error:.3e}, of one rounding {rounded:.3e}")


@torch.no_grad()
def measure(function: str, length: int, dtype: torch.dtype, device: str) -> dict:
    """One length's row of the results."""
    many = BYTES // (length * dtype.itemsize) if device == "cuda" else 16
    inputs = torch.randn(4, max(many // 4, 1), length, device=device, dtype=dtype).unbind()
    out, transform = [torch.empty_like(x) for x in inputs], getattr(lk, function)
    right(function, transform(inputs[0]), inputs[0])
    calls: dict[str, Callable[[Tensor, Tensor], object]] = {
        "copy": lambda x, y: y.copy_(x),
        function: lambda x, y: transform(x),
    }
    if length <= DENSE and device == "cuda":
        M = transform(torch.eye(length, device=device, dtype=dtype))
        calls["matmul"] = lambda x, y: torch.mm(x, M, out=y)
    replays = {
        name: captured([lambda x=x, y=y, call=call: call(x, y) for x, y in zip(inputs, out, strict=True)])
        for name, call in calls.items()
    }
    took = {f"{name}_us": us / len(inputs) for name, us in times(replays).items()}
    return {"length": length, "rows": len(inputs[0]), "dtype": str(dtype).removeprefix("torch."), **took,
            "of_copy": took["copy_us"] / took[f"{function}_us"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no length after so many")
    parser.add_argument("--dry-run", action="store_true", help="few rows on the CPU: the path, no times")
    options = parser.parse_args()
    torch.manual_seed(0)
    end = time.monotonic() + options.seconds
    first, dtypes = 1 if options.dry_run else None, (torch.bfloat16, torch.float32)
    todo = [("wht", length, dtype) for dtype in dtypes for length in LENGTHS[: 3 if options.dry_run else None]]
    for function in TRANSFORM_FUNCTIONS[1:]:
        todo += [(function, length, dtype) for dtype in dtypes for length in OTHERS[:first]]
    result = {"machine_info": machine(), "datetime": str(datetime.now(timezone.utc)), "left_out": len(todo)}
    result |= {function: [] for function in TRANSFORM_FUNCTIONS}
    options.out.mkdir(parents=True, exist_ok=True)
    for function, *which in todo:
        if time.monotonic() > end:
            print(f"{result['left_out']} are left out: the {options.seconds:.0f} s are over", flush=True)
            break
        result["left_out"] -= 1
        result[function].append(measure(function, *which, "cpu" if options.dry_run else "cuda"))
        (options.out / "gpu_transforms.json").write_text(json.dumps(result, indent=1) + "\n")
        print(function, result[function][-1], flush=True)


if __name__ == "__main__":
    main()
