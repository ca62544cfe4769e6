"""The same batch with PEFT and with the kernels: the answers, and how long a step takes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lora_kernels

from ..ops._dispatch import extension_error
from ..ops._low_rank import lora_add_
from ..testing import ratio, take_turns
from .model import quiet

BASE = "__base__"
ROWS, CACHED = 8, 64
FEWEST_ROUNDS, MOST_ROUNDS = 5, 31
CASES = ((1, True), (64, True), (1, False), (64, False))  # (tokens a row, mixed batch)


@dataclass(frozen=True)
class Timing:
    """Medians over ``rounds``, seconds; the ratios are medians of each round's own ratio to the base model."""

    tokens: int
    mixed: bool
    base: float
    peft: float
    patched: float
    peft_ratio: float
    patched_ratio: float
    spread: float
    rounds: int


def instruction_set(device: torch.device) -> str:
    """The GPU and what its kernels are, or the widest vector instructions of this CPU and those its kernels use."""
    if device.type == "cuda":
        kernels = ", ".join(sorted(lora_add_.backends() & {"cuda", "triton"})) or "none"
        return f"{torch.cuda.get_device_name(device)}; kernels: {kernels}"
    name = torch.backends.cpu.get_cpu_capability()
    kernels = "none compiled" if extension_error else torch.ops.lora_kernels_C.get_isa()
    return f"torch: {name}; kernels: {kernels}"


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: Sequence[list[int]], names: Sequence[str], length: int) -> Tensor:
    """Greedy answers to all prompts in one batch, one adapter a row.

    Args:
        model: a ``PeftModel``.
        prompts: tokens, one list a row.
        names: the adapter of each row, or ``__base__``.
        length: the most tokens of an answer.

    Returns:
        ``[rows, ≤ length]`` token ids, on the CPU.
    """
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    tensor = partial(torch.tensor, device=model.device)
    ids = tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    greedy = GenerationConfig(
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    with quiet():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy, adapter_names=list(names))
    return out[:, longest:].cpu()


def first_difference(ours: Tensor, theirs: Tensor) -> list[int | None]:
    """For each row the first token that differs, or None; a row that one of them ends earlier differs there."""
    shared = min(ours.shape[1], theirs.shape[1])
    rows: list[int | None] = []
    for mine, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        different = (i for i in range(shared) if mine[i] != other[i])
        rows.append(next(different, None if ours.shape[1] == theirs.shape[1] else shared))
    return rows


def times(
    peft_model: Any, names: Sequence[str], *, seconds: float = 5.0, progress: Callable[[], None] = lambda: None
) -> list[Timing]:
    """Time one step of each of :data:`CASES`: the model without adapters, with PEFT, and patched.

    All three share one set of weights, converted to bfloat16 in place. They take turns, from the same cache, and the
    order rotates. A step of one token a row continues ``CACHED`` tokens; one of many is a prefill that computes the
    logits of the last token only, as ``generate`` does. PEFT's hooks that tell the layers each row's adapter are set
    before the clock starts, which is what ``generate`` does too.

    Args:
        peft_model: in eval mode, not patched.
        names: its adapters; a mixed batch of ``ROWS`` takes them in turn, the other cases the first.
        seconds: about how long to repeat a case.
        progress: called after each case.
    """
    for weight in peft_model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    fast = twin(peft_model)
    with quiet():
        base = twin(peft_model).unload()
    peft_model.set_adapter(names[0])
    fast.set_adapter(names[0])
    handle = lora_kernels.patch(fast)
    try:
        timings = []
        for tokens, mixed in CASES:
            row_names = [names[i % len(names)] for i in range(ROWS)] if mixed else None
            timings.append(_time_case(base, peft_model, fast, tokens, row_names, seconds))
            progress()
        return timings
    finally:
        handle.unpatch()


def twin(model: Any) -> Any:
    """A copy of ``model`` with the same parameters, not copies of them."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


@torch.no_grad()
def stepper(base: Any, tokens: int) -> Callable[[Any], float]:
    """What runs one step of :func:`times` with ``base`` or a twin of it and returns how long it took, in seconds."""
    # A frozen output layer is copied by torch for each row's last token (a matmul of strided rows), the costliest part.
    base.get_output_embeddings().weight.requires_grad_(True)
    generator, device = torch.Generator().manual_seed(0), base.device
    prefix, ids = (
        torch.randint(0, base.config.vocab_size, (ROWS, columns), generator=generator).to(device)
        for columns in (CACHED, tokens)
    )
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    cache = base(input_ids=prefix, use_cache=True, **last).past_key_values if tokens == 1 else None

    @torch.no_grad()
    def step(model: Any) -> float:
        past = copy.deepcopy(cache)
        _wait(device)
        start = time.perf_counter()
        model(input_ids=ids, past_key_values=past, use_cache=True, **last)
        _wait(device)
        return time.perf_counter() - start

    return step


def _wait(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_case(base: Any, peft_model: Any, fast: Any, tokens: int, names: list[str] | None, seconds: float) -> Timing:
    step = stepper(base, tokens)
    with contextlib.ExitStack() as stack:
        for model in (peft_model, fast):
            if names is not None:
                stack.enter_context(model._enable_peft_forward_hooks(adapter_names=names))
        models = [base, peft_model.get_base_model(), fast.get_base_model()]
        taken = take_turns(
            [partial(step, model) for model in models], fewest=FEWEST_ROUNDS, most=MOST_ROUNDS, seconds=seconds
        )
    first, _, third = statistics.quantiles(taken[0], n=4, method="inclusive")
    return Timing(
        tokens,
        names is not None,
        base=statistics.median(taken[0]),
        peft=statistics.median(taken[1]),
        patched=statistics.median(taken[2]),
        peft_ratio=ratio(taken[1], taken[0])[0],
        patched_ratio=ratio(taken[2], taken[0])[0],
        spread=third / first,
        rounds=len(taken[0]),
    )
