"""Forward and backward with LoRA in training: a model's step and one layer's, of PEFT and patched, over the base's.

The allocator keeps what a step frees, but in the first case, which takes it as it comes.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocator import keeping_freed_memory
from bench_peft import RANK, SHAPE, TARGETS, lora_layers
from compare import OURS, Case, Rounds, compare
from gradients import check_layer, errors, kept
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.demo.measure import twin
from lora_kernels.demo.model import quiet

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

BASE, PEFT = "base", "PEFT"
PROVIDERS = (BASE, PEFT, OURS)
KINDS = {
    "LoRA": {},
    "LoRA, dropout 0.05": {"lora_dropout": 0.05},
    "DoRA": {"use_dora": True},
    "DoRA, dropout 0.05": {"use_dora": True, "lora_dropout": 0.05},
}
RETURNED = "LoRA, memory returned"  # by an allocator as it comes
STEP_TARGETS = dict(zip(KINDS, (1.12, 1.15, 1.25, 2.0), strict=True))  # of our time over the base's
LAYER_TARGETS = dict(zip(KINDS, (1.10, 1.15, 1.40, None), strict=True))
ROWS, TOKENS = 8, 64
M, WIDTH = 512, 2048
SHARES = (0.02, 0.2, 0.8)


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)


@functools.cache
def bases():
    """The frozen models: one of SmolLM2-135M's shape, and one layer."""
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    return llama.bfloat16().requires_grad_(False), One().bfloat16().requires_grad_(False)


def models_with(base: Any, targets: list[str], kind: str) -> dict[str, Any]:
    """The base, PEFT's model and the patched one, in training; weights shared, adapters as if trained for a while."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=targets, init_lora_weights=False, **KINDS.get(kind, {})
    )
    with quiet():
        model = peft.get_peft_model(twin(base), config).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.15)
            elif "magnitude" in name:
                weight.mul_(1 + 0.1 * torch.randn_like(weight))
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    patched = twin(model)
    lk.patch(patched, strict=True)
    return {BASE: base.train(), PEFT: model, OURS: patched}


@torch.enable_grad()
def timed(run: Callable[[Any, Tensor], None], model: Any, x: Tensor) -> float:
    """Seconds of a forward and a backward pass; the gradients are freed after it."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    x = x.detach().requires_grad_()
    start = time.perf_counter()
    run(model, x)
    seconds = time.perf_counter() - start
    for weight in weights:
        weight.grad = None
    return seconds


def in_turns(group: str, steps: dict[str, Callable[[], float]], rounds: Rounds, few: Rounds, **info: object):
    """{provider: its case}: ours beside the base, and PEFT, which leaves the caches and the heap another way, too."""
    case = compare(group, {name: steps[name] for name in (BASE, OURS)}, rounds, **info)
    cases: dict[str, Case] = dict.fromkeys(PROVIDERS, case)
    cases[PEFT] = compare(group, {name: steps[name] for name in (BASE, PEFT)}, few, **info)
    return cases


def loss_backward(ids: Tensor, model: Any, x: Tensor) -> None:
    logits = model(inputs_embeds=x, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()


def check_layers(models: dict[str, Any]) -> None:
    patched = lora_layers(models[OURS])
    for name, layer in lora_layers(models[PEFT]).items():
        x, dy = (torch.randn(ROWS, TOKENS, width).bfloat16() for width in (layer.in_features, layer.out_features))
        check_layer(patched[name], layer, x, dy, name)


@pytest.fixture(scope="module", params=[RETURNED, *KINDS])
def step_cases(request, rounds):
    kind = request.param
    keeping = contextlib.nullcontext(False) if kind == RETURNED else keeping_freed_memory()
    with keeping as kept:
        return step_cases_of(kind, rounds, kept)


def step_cases_of(kind, rounds, freed_memory_kept):
    models = models_with(bases()[0], TARGETS, kind)
    ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    x = models[BASE].get_input_embeddings()(ids)
    check_layers(models)
    run = partial(loss_backward, ids)
    return in_turns(
        f"training step, {kind}",
        {name: partial(timed, run, model, x) for name, model in models.items()},
        rounds(31, 61, 60),
        rounds(7, 7),
        kind=kind,
        target=STEP_TARGETS.get(kind),
        freed_memory_kept=freed_memory_kept,
        rows=ROWS,
        tokens=TOKENS,
        R=RANK,
        model="SmolLM2-135M's shape, random weights",
    )


@pytest.fixture(scope="module", params=KINDS)
def layer_cases(request, rounds):
    with keeping_freed_memory() as kept:
        return layer_cases_of(request.param, rounds, kept)


def layer_cases_of(kind, rounds, freed_memory_kept):
    models = models_with(bases()[1], ["proj"], kind)
    layers = {PEFT: models[PEFT].base_model.model.proj, OURS: models[OURS].base_model.model.proj}
    x, dy = torch.randn(2, M, WIDTH).bfloat16()
    check_layer(layers[OURS], layers[PEFT], x, dy, "the layer")
    return in_turns(
        f"training layer, {kind}",
        {
            name: partial(timed, lambda layer, x: layer(x).backward(dy), layer, x)
            for name, layer in {BASE: models[BASE].proj, **layers}.items()
        },
        rounds(61, 301, 10),
        rounds(31, 61, 5),
        kind=kind,
        target=LAYER_TARGETS[kind],
        freed_memory_kept=freed_memory_kept,
        M=M,
        K=WIDTH,
        N=WIDTH,
        R=RANK,
        kept={name: kept(layer, x) for name, layer in layers.items()},
        errors={str(share): errors(layers, x, share) for share in SHARES} if kind == "LoRA" else {},
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_step(replay, step_cases, provider):
    replay(step_cases[provider], provider)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_layer(replay, layer_cases, provider):
    replay(layer_cases[provider], provider)
