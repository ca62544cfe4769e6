"""Times of a linear layer with a packed weight and one adapter on a GPU, as JSON.

    python benchmarks/gpu_quantized.py --out DIR [--seconds S] [--dry-run]

Each is a frozen layer of Llama-3.1-8B in NF4 with one adapter of rank 16 in bf16, forward or the gradient of x.
``unpacked`` is the same with the weight unpacked by our kernel at each call and multiplied by torch, ``bf16`` with a
weight that is not packed at all, ``bitsandbytes`` with its matmul, where it is installed; the adapter is added in plain
PyTorch. All run in a captured graph over layers with weights of their own; ``us`` is a layer's time. What is timed was
checked against float64 first; cases that S seconds do not suffice for are left out and counted.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from compare import OURS, check
from gpu_low_rank import REPLAYS, captured, machine, times
from peers import reason
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.ops._low_rank import lora_shrink
from lora_kernels.ops._quantized import dequantize_, quantized_linear, quantized_linear_grad
from lora_kernels.quantization.tables import NF4
from lora_kernels.reference.quantized import dequantized

UNPACKED, BF16, BNB = "unpacked", "bf16", "bitsandbytes"
SCALE, RANK, GROUP = 2.0, 16, 64
SITES = {"o": (4096, 4096), "gate": (4096, 14336), "down": (14336, 4096)}  # K and N
# pass, site, rows: the more telling first
GRID = [
    *(("forward", "o", rows) for rows in (1, 16, 64, 256, 1024, 8192)),
    *(("forward", "gate", rows) for rows in (1, 64, 2048)),
    *(("gradient", "o", rows) for rows in (256, 2048, 8192)),
    ("forward", "down", 1),
    ("gradient", "gate", 2048),
]

Call = Callable[[int], Tensor]  # of a layer


class Case:
    """The tensors of one layer shape, over some layers, and what each provider does with them."""

    def __init__(self, which: str, site: str, rows: int, device: str, layers: int):
        K, N = SITES[site] if device == "cuda" else [n // 32 for n in SITES[site]]
        self.K, self.N, self.rows, self.layers, self.which = K, N, rows, range(layers), which
        make = lambda *size: torch.randn(size, device=device)  # noqa: E731
        self.x = make(rows, K if which == "forward" else N).bfloat16()
        table = torch.tensor(NF4, device=device)
        self.weights = [
            (torch.randint(0, 256, (N, K // 2), device=device).to(torch.uint8),
             (torch.rand(N, K // GROUP, device=device) + 0.5) / math.sqrt(K), None, table, GROUP)
            for _ in self.layers
        ]  # fmt: skip
        self.A = [(make(RANK, K) / math.sqrt(K)).bfloat16() for _ in self.layers]
        self.B = [make(N, RANK).bfloat16() for _ in self.layers]

    def ours(self, i: int) -> Tensor:
        """The shrink and the fused product."""
        x, A, B = self.x, self.A[i], self.B[i]
        factors = [A] if self.which == "forward" else [B.T]
        v = lora_shrink(x, factors, None, None, None, None, self.rows)
        if self.which == "forward":
            return quantized_linear(x, *self.weights[i], None, v, [B], *(None,) * 6, SCALE)
        return quantized_linear_grad(x, *self.weights[i], self.K, v[0], A, SCALE)

    def with_adapter(self, i: int, base: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The adapter's part as one writes it."""
        x, A, B = (t.to(dtype) for t in (self.x, self.A[i], self.B[i]))
        return base + SCALE * linear(linear(x, A), B) if self.which == "forward" else base + SCALE * (x @ B @ A)

    def base(self, W: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The layer's own product."""
        return linear(self.x.to(dtype), W) if self.which == "forward" else self.x.to(dtype) @ W

    def unpacked(self, i: int) -> Tensor:
        """Two steps instead of a fused one."""
        W = torch.empty(self.N, self.K, dtype=torch.bfloat16, device=self.x.device)
        dequantize_(W, *self.weights[i], 0, 0)
        return self.with_adapter(i, self.base(W))

    def bf16(self) -> Call:
        """Of weights unpacked before."""
        W = [dequantized(*weight, self.K, torch.bfloat16) for weight in self.weights]
        return lambda i: self.with_adapter(i, self.base(W[i]))

    def bitsandbytes(self) -> Call:
        """Its matmul on the same bytes; ImportError without it."""
        import bitsandbytes as bnb

        states = [
            bnb.functional.QuantState(
                scales.flatten(), torch.Size((self.N, self.K)), table, GROUP, "nf4", torch.bfloat16
            )
            for _, scales, _, table, _ in self.weights
        ]
        codes = [weight[0].view(-1, 1) for weight in self.weights]

        def call(i: int) -> Tensor:
            if self.which == "forward":
                return self.with_adapter(i, bnb.matmul_4bit(self.x, codes[i].t(), states[i]))
            return self.with_adapter(i, self.base(bnb.functional.dequantize_4bit(codes[i], states[i])))

        return call

    def right(self, name: str, call: Call) -> None:
        """Layer 0 against float64, beside PyTorch in bf16."""
        wide, half = (dequantized(*self.weights[0], self.K, dtype) for dtype in (torch.float64, torch.bfloat16))
        exact = self.with_adapter(0, self.base(wide, torch.float64), torch.float64)
        check({name: call(0)}, exact, self.with_adapter(0, self.base(half)), what=f"{self.which}, {self.rows} rows")


@torch.no_grad()
def measure(which: str, site: str, rows: int, device: str, layers: int) -> dict:
    """One case's row of the results. bitsandbytes is left out where it fails, with the reason."""
    case, failed = Case(which, site, rows, device, layers), {}
    calls = {OURS: case.ours, UNPACKED: case.unpacked, BF16: case.bf16()}
    replays = {}
    for name in (*calls, BNB):
        try:
            call = calls[name] if name in calls else case.bitsandbytes()
            case.right(name, call)
            replays[name] = captured([lambda i=i, call=call: call(i) for i in case.layers])
        except Exception as error:
            if name != BNB:
                raise
            failed[name] = reason(error)
    row = {"pass": which, "site": site, "rows": rows, "us": {n: us / layers for n, us in times(replays).items()}}
    return {**row, **({"failed": failed} if failed else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: the path, no times")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.dry_run:
        torch.set_num_threads(1)
    end = time.monotonic() + options.seconds
    result = {"machine_info": machine(), "datetime": str(datetime.now(timezone.utc)), "replays": REPLAYS,
              "rank": RANK, "left_out": len(GRID), "layers": []}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for which, site, rows in GRID:
        if time.monotonic() > end:
            print(f"{result['left_out']} cases are left out: the {options.seconds:.0f} s are over", flush=True)
            break
        result["left_out"] -= 1
        where = ("cpu", 1) if options.dry_run else ("cuda", 8)
        row = measure(which, site, min(rows, 64) if options.dry_run else rows, *where)
        result["layers"].append(row)
        (options.out / "gpu_quantized.json").write_text(json.dumps(result, indent=1) + "\n")
        print(" | ".join([f"{which} {site} {rows}", *(f"{n} {us:.1f}" for n, us in row["us"].items())]), flush=True)


if __name__ == "__main__":
    main()
