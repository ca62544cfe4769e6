"""Times of ``lora_linear`` in training on a GPU, beside the layer without an adapter, plain PyTorch and PEFT, as JSON.

    python benchmarks/gpu_lora_linear.py --out DIR [--seconds S] [--dry-run]

A step is the forward and the backward pass of one frozen linear layer of Llama-3.1-8B with an adapter of fp32 masters:
y and the gradients of x, A, B and, of DoRA, the magnitude. ``base`` is the layer alone, its product and that of x's
gradient. ``us`` is a step's time in a captured graph over layers with weights of their own, ``launched_us`` that of the
same steps as Python launches them. Ours is checked against float64 with the mask of a given seed, PEFT without masks;
steps that S seconds do not suffice for are left out and counted.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from compare import OURS, check
from gpu_low_rank import REPLAYS, captured, machine, times
from peers import reason
from torch import Tensor
from torch.nn.functional import dropout, linear

import lora_kernels as lk
from lora_kernels.reference.dropout import dropout_mask, keep_scale
from lora_kernels.testing import rms

BASE, TORCH, PEFT = "base", "torch", "PEFT"
SCALE = 2.0
P = 0.05
SITES = {"o": (4096, 4096), "gate": (4096, 14336), "down": (14336, 4096)}  # K and N
KINDS = {"LoRA": (False, 0.0), "LoRA, dropout": (False, P), "DoRA": (True, 0.0), "DoRA, dropout": (True, P)}
# kinds, (site, rows, rank): the more telling first
GRID = [
    (tuple(KINDS), ("o", 8192, 16)),
    (tuple(KINDS), ("o", 2048, 16)),
    (tuple(KINDS)[:2], ("gate", 8192, 16)),
    (tuple(KINDS)[:2], ("down", 2048, 16)),
    (tuple(KINDS)[:2], ("o", 8192, 64)),
]

Drop = Callable[[Tensor], Tensor]
Step = Callable[[int], object]  # of a layer


def in_torch(x: Tensor, W: Tensor, A: Tensor, B: Tensor, m: Tensor | None, drop: Drop) -> Tensor:
    """The layer as one writes it down: x W + s B A x̃, or DoRA's weighted sum, the factors' part in their dtype."""
    base, dropped = linear(x, W), drop(x.to(A.dtype))
    delta = SCALE * linear(linear(dropped, A), B)
    if m is None:
        return (base + delta).to(x.dtype)
    with torch.no_grad():
        norm = torch.linalg.vector_norm(W.to(A.dtype) + SCALE * (B @ A), dim=1)
    c = m / norm
    return (base + (c - 1) * linear(dropped.to(x.dtype), W) + c * delta).to(x.dtype)


class Case:
    """The tensors of one layer shape, over some layers, and a step of each provider."""

    def __init__(self, kind: str, site: str, rows: int, rank: int, device: str, layers: int):
        K, N = SITES[site] if device == "cuda" else [n // 64 for n in SITES[site]]
        dora, self.p = KINDS[kind]
        make = lambda *size: torch.randn(size, device=device)  # noqa: E731
        self.x, self.dy = make(rows, K).bfloat16().requires_grad_(), make(rows, N).bfloat16()
        self.W = [(make(N, K) / math.sqrt(K)).bfloat16() for _ in range(layers)]
        self.leaves, self.weight_norm_sq = [], []
        for W in self.W:
            A, B = make(rank, K) / math.sqrt(K), make(N, rank) / (SCALE * math.sqrt(rank))
            square = W.float().square().sum(1)
            self.weight_norm_sq.append(square if dora else None)
            m = [(square + (SCALE * B).square().sum(1)).sqrt()] if dora else []
            self.leaves.append([t.requires_grad_() for t in (A, B, *m)])

    def step(self, y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        """y and the gradients of what it is made of."""
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(y.dtype))]

    def ours(self, i: int, seed: Tensor | None = None) -> list[Tensor]:
        """One call; without a seed it draws one."""
        A, B, *m = self.leaves[i]
        y = lk.lora_linear(
            self.x, self.W[i], A, B, scaling=SCALE, dropout=self.p, training=True, seed=seed,
            magnitude=m[0] if m else None, weight_norm_sq=self.weight_norm_sq[i],
        )  # fmt: skip
        return self.step(y, [self.x, *self.leaves[i]])

    def plain(self, i: int, drop: Drop | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """In PyTorch; in ``dtype``, or as it comes."""
        x, W, *leaves = (t if dtype is None else t.detach().to(dtype) for t in (self.x, self.W[i], *self.leaves[i]))
        inputs = [x.requires_grad_(), *(t.requires_grad_() for t in leaves)]
        A, B, *m = leaves
        y = in_torch(x, W, A, B, m[0] if m else None, drop or (lambda x: dropout(x, self.p) if self.p else x))
        return self.step(y, inputs)

    def peft(self) -> tuple[list[Any], Step]:
        """PEFT's layers and a step of them; ImportError without PEFT."""
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        layers = []
        for W, (A, B, *m) in zip(self.W, self.leaves, strict=True):
            base = torch.nn.Linear(*W.T.shape, bias=False, device="meta")
            base.weight = torch.nn.Parameter(W, requires_grad=False)
            rank = A.shape[0]
            config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), lora_dropout=self.p, use_dora=bool(m))
            layer = Linear(base, "default", r=rank, lora_alpha=int(SCALE * rank), config=config)
            layer.lora_A["default"].weight, layer.lora_B["default"].weight = map(torch.nn.Parameter, (A, B))
            if m:
                layer.lora_magnitude_vector["default"].weight = torch.nn.Parameter(m[0])
            layers.append(layer)

        def step(i: int) -> list[Tensor]:
            layer = layers[i]
            magnitudes = [v.weight for v in layer.lora_magnitude_vector.values()]
            leaves = [self.x, layer.lora_A["default"].weight, layer.lora_B["default"].weight, *magnitudes]
            return self.step(layer(self.x), leaves)

        return layers, step

    def base(self, i: int) -> list[Tensor]:
        """The layer without an adapter."""
        return self.step(linear(self.x, self.W[i]), [self.x])

    def check(self, name: str, found: list[Tensor], seed: Tensor | None) -> None:
        """Hold y and the gradients of layer 0 against float64, with the mask of ``seed`` or none."""
        drop: Drop = lambda x: x  # noqa: E731
        if seed is not None:
            mask = dropout_mask(seed, *self.x.shape, self.p)
            drop = lambda x: x * mask * keep_scale(self.p)  # noqa: E731
        oracle, plain = self.plain(0, drop, torch.float64), self.plain(0, drop)
        for i, (got, exact, other) in enumerate(zip(found, oracle, plain, strict=True)):
            # A product of dy or x has 16 bits or more of its fp32 operand; m's gradient is read off y, rounded twice.
            noise = 2 ** (-8 if i == 4 else -16) * rms(exact)
            check({name: got}, exact, other, noise=noise, what=f"y and the gradients of x, A, B, m: {i}")


def measure(kind: str, site: str, rows: int, rank: int, device: str, layers: int) -> dict:
    """One step's row of the results. PEFT is left out where it fails, with the reason."""
    case, failed = Case(kind, site, rows, rank, device, layers), {}
    seed = torch.tensor([1234567890123], device=device) if case.p else None
    case.check(OURS, case.ours(0, seed), seed)
    steps: dict[str, Step] = {BASE: case.base, OURS: case.ours, TORCH: case.plain}
    captured_steps = {}
    try:
        twins, steps[PEFT] = case.peft()
        twins[0].eval()
        case.check(PEFT, steps[PEFT](0), None)
        twins[0].train()
    except Exception as error:
        steps.pop(PEFT, None)
        failed[PEFT] = reason(error)
    for name, step in list(steps.items()):
        try:
            captured_steps[name] = captured([lambda i=i, step=step: step(i) for i in range(layers)])
        except Exception as error:
            if name != PEFT:
                raise
            del steps[PEFT]
            failed[name] = reason(error)
    launched = {name: lambda step=step: [step(i) for i in range(layers)] for name, step in steps.items()}
    row = {"kind": kind, "site": site, "rows": rows, "rank": rank}
    for what, replays in (("us", captured_steps), ("launched_us", launched)):
        row[what] = {name: us / layers for name, us in times(replays).items()}
    return {**row, **({"failed": failed} if failed else {})}


def line(row: dict) -> str:
    """A step's row, to read."""
    base = row["us"][BASE]
    found = (
        f"{name} {us:.0f} ({us / base:.2f}×), launched {row['launched_us'][name]:.0f}" for name, us in row["us"].items()
    )
    failed = (f"{name} not timed: {why}" for name, why in row.get("failed", {}).items())
    return " | ".join([f"{row['kind']} {row['site']} {row['rows']} {row['rank']}", *found, *failed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no step after so many")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: the path, no times")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.dry_run:
        torch.set_num_threads(1)
    end = time.monotonic() + options.seconds
    todo = [(kind, *one) for kinds, one in GRID for kind in kinds]
    result = {"machine_info": machine(), "datetime": str(datetime.now(timezone.utc)), "replays": REPLAYS,
              "dropout": P, "left_out": len(todo), "steps": []}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for kind, site, rows, rank in todo:
        if time.monotonic() > end:
            print(f"{result['left_out']} steps are left out: the {options.seconds:.0f} s are over", flush=True)
            break
        result["left_out"] -= 1
        where = ("cpu", 1) if options.dry_run else ("cuda", 3)
        result["steps"].append(measure(kind, site, min(rows, 256) if options.dry_run else rows, rank, *where))
        (options.out / "gpu_lora_linear.json").write_text(json.dumps(result, indent=1) + "\n")
        print(line(result["steps"][-1]), flush=True)


if __name__ == "__main__":
    main()
