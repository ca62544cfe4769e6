"""One step of a model of SmolLM2-135M's shape with LoRA on all linear layers: PEFT, by hand, patched."""

from __future__ import annotations

import contextlib
import functools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compare import OURS, check, compare

import lora_kernels as lk
from lora_kernels.demo.measure import CACHED, CASES, ROWS, stepper, twin
from lora_kernels.demo.model import quiet

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_kernels.integrations._peft_batch import NAMES as LAYERS_NAMES  # noqa: E402  (it needs PEFT)

BF16, MASTERS = "bf16", "fp32 masters"
BASE, PEFT, ADDMM, TOUCH, IDLE = "base model", "PEFT", "addmm", "torch + touch", "no adapter"
PROVIDERS = (BASE, PEFT, ADDMM, OURS, TOUCH, IDLE)
RANK = 16
NAMES = [f"adapter{i}" for i in range(ROWS)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {  # of SmolLM2-135M; the weights are random, which takes as long
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


def addmm_forward(linear, parts, x):
    """The strong way by hand: y = x Wᵀ, then y[rows] += s (x[rows] Aᵀ) Bᵀ in place; masters are rounded on the way."""
    y = F.linear(x, linear.weight, linear.bias)
    x2, y2 = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for rows, A, B, s in parts:
        y2[rows].addmm_(x2[rows] @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=s)
    return y


def touch_forward(linear, storage, x):
    """What adding to y afterwards takes at least: y rewritten, many rows of x and a mixed batch's factors read."""
    y = F.linear(x, linear.weight, linear.bias)
    if storage is not None:
        storage.sum()
    if x.shape[1] > 1:
        x.view(torch.float32).sum()
    return y.neg_()


def idle_step(step, model, tokens, mixed):
    """The patched model finds its layers' states and a routing by which no row has an adapter."""
    adapters = tuple(NAMES if mixed else NAMES[:1])
    ids = torch.full((ROWS * tokens,), -1, dtype=torch.int32)
    with model._enable_peft_forward_hooks(adapter_names=NAMES if mixed else ROWS * NAMES[:1]):
        names = next(iter(lora_layers(model).values())).__dict__[LAYERS_NAMES]  # the one that all layers share
        names._routings[len(ids)] = adapters, lk.BatchPlan.from_ids(ids, len(adapters)).table
        return step(model.get_base_model())


def factors(layer, tokens, mixed):
    """(rows, A, B, s) of each adapter in use: sample i has adapter i, or all rows have the first."""
    rows = [slice(i * tokens, (i + 1) * tokens) for i in range(ROWS)] if mixed else [slice(None)]
    return [
        (part, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for part, name in zip(rows, NAMES, strict=False)
    ]


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@functools.cache
def models_with(adapters):
    """The model without adapters, with PEFT, patched, and with its linear layers' forward replaced; weights shared."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    with quiet():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).bfloat16().eval()
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, init_lora_weights=False)
        masters = adapters == MASTERS
        peft_model = get_peft_model(model, config, adapter_name=NAMES[0], autocast_adapter_dtype=masters)
        for name in NAMES[1:]:
            peft_model.add_adapter(name, config, autocast_adapter_dtype=masters)
        peft_model.eval().requires_grad_(False)
        base, by_hand, touched = (twin(peft_model).unload() for _ in range(3))
        patched = twin(peft_model)
    lk.patch(patched, strict=True)
    dtypes = {layer.lora_A[NAMES[0]].weight.dtype for layer in lora_layers(peft_model).values()}
    assert dtypes == {torch.float32 if masters else torch.bfloat16}
    return SimpleNamespace(base=base, peft=peft_model, by_hand=by_hand, touched=touched, patched=patched)


@torch.no_grad()
def check_layers(models, step, tokens, mixed):
    """Each LoRA layer of the patched model and of the one by hand, on what PEFT's layer got, against float64."""
    patched, by_hand = lora_layers(models.patched), dict(models.by_hand.named_modules())

    def held_against(name, layer, args, plain):
        (x,) = args
        oracle = (x.double() @ layer.base_layer.weight.double().T).flatten(0, -2)
        rows = x.flatten(0, -2).double()
        for part, A, B, s in factors(layer, tokens, mixed):
            oracle[part] += s * (rows[part] @ A.double().T) @ B.double().T
        results = {OURS: patched[name](x), ADDMM: by_hand[name.removeprefix("base_model.model.")](x)}
        check(results, oracle.view(plain.shape), plain, what=name)

    hooks = [
        layer.register_forward_hook(partial(held_against, name)) for name, layer in lora_layers(models.peft).items()
    ]
    try:
        step(models.peft.get_base_model())
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(
    scope="module",
    params=[(adapters, *case) for adapters in (BF16, MASTERS) for case in CASES],
    ids=lambda case: f"{ROWS}x{case[1]}-{'mixed' if case[2] else 'one'}-{case[0]}",
)
def step_case(request, rounds):
    adapters, tokens, mixed = request.param
    models = models_with(adapters)
    step = stepper(models.base, tokens)
    linears, touched = dict(models.by_hand.named_modules()), dict(models.touched.named_modules())
    for name, layer in lora_layers(models.peft).items():
        inner = name.removeprefix("base_model.model.")
        parts = factors(layer, tokens, mixed)
        linears[inner].forward = partial(addmm_forward, linears[inner], parts)
        storage = torch.cat([t.flatten() for _, *AB, _ in parts for t in AB]).view(torch.float32) if mixed else None
        touched[inner].forward = partial(touch_forward, touched[inner], storage)
    with contextlib.ExitStack() as stack:
        for model in (models.peft, models.patched):
            model.set_adapter(NAMES[0])
            if mixed:
                stack.enter_context(model._enable_peft_forward_hooks(adapter_names=NAMES))
        check_layers(models, step, tokens, mixed)
        timed = {
            BASE: models.base,
            PEFT: models.peft.get_base_model(),
            ADDMM: models.by_hand,
            OURS: models.patched.get_base_model(),
            TOUCH: models.touched,
        }
        steps = {name: partial(step, model) for name, model in timed.items()}
        steps[IDLE] = partial(idle_step, step, models.patched, tokens, mixed)
        return compare(
            f"step, {ROWS} × {tokens}, {'mixed' if mixed else 'one adapter'}, {adapters}",
            steps,
            rounds(31, 61, 12),
            rows=ROWS,
            tokens=tokens,
            mixed=mixed,
            adapters=adapters,
            cached=CACHED,
            R=RANK,
            L=len(NAMES),
            model="SmolLM2-135M's shape, random weights",
        )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_step(replay, step_case, provider):
    replay(step_case, provider)
