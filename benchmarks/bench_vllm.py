"""vLLM on the CPU with LoRA: its own kernels and the plug-in's, over the same engine without LoRA.

Engines are processes. How memory falls out for one moves its times by several per cent for as long as it lives, so all
of them are started anew several times, and the rounds of all generations are taken together.
"""

from __future__ import annotations

import contextlib

import pytest
from compare import OURS, Case
from engine import Engine

from lora_kernels.demo.adapters import TARGETS
from lora_kernels.demo.model import bundled_model, load, quiet
from lora_kernels.testing import take_turns

pytest.importorskip("vllm")
pytest.importorskip("peft")

NO_LORA, VLLM, IDLE, NARROW, WIDE = "no LoRA", "vLLM", "no adapter", "max_lora_rank 8", "max_lora_rank 64"
ROWS, SLOTS, MEMORY = 8, 8, {"MALLOC_TRIM_THRESHOLD_": "8589934592", "MALLOC_MMAP_THRESHOLD_": "1073741824"}
STEPS = {"decode": (8, 32), "prefill": (120, 1)}  # tokens of a prompt, new tokens
GENERATIONS = 3
CLOSE = 0.25  # nats between two kernels' log-probabilities of a first token, in bf16 through 30 layers


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Paths by rank of random adapters of the demo's model on all linear layers, saved by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    made = {}
    with quiet():
        model, _ = load(bundled_model(False))
        for rank in (8, 16):
            folder = tmp_path_factory.mktemp(f"rank{rank}")
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
            for slot in range(SLOTS):
                torch.manual_seed(100 * rank + slot)
                peft_model = get_peft_model(model, config)
                for name, parameter in peft_model.named_parameters():
                    if "lora_B" in name:
                        parameter.data.mul_(0.3)
                peft_model.save_pretrained(str(folder / str(slot)))
                peft_model.unload()
            made[rank] = [folder / str(slot) for slot in range(SLOTS)]
    return made


@contextlib.contextmanager
def engines():
    """All engines, by name."""
    common = dict(dtype="bfloat16", enforce_eager=True, max_model_len=512, max_num_seqs=ROWS)
    with_lora = {**common, "enable_lora": True, "max_loras": SLOTS, "max_cpu_loras": SLOTS}
    model = bundled_model(False)
    with contextlib.ExitStack() as stack:
        started = {}
        for name, plugin, options in (
            (NO_LORA, False, common),
            (VLLM, False, {**with_lora, "max_lora_rank": 16}),
            (OURS, True, {**with_lora, "max_lora_rank": 16}),
            (NARROW, True, {**with_lora, "max_lora_rank": 8}),
            (WIDE, True, {**with_lora, "max_lora_rank": 64}),
        ):
            started[name] = Engine(model, plugin=plugin, environment=MEMORY, **options)
            stack.callback(started[name].close)
        yield started


def check(engine, paths):
    """First tokens with adapters: as vLLM's own kernels have them, and not those without."""
    own, theirs = (engine[name].generate(120, 1, paths, logprobs=1) for name in (OURS, VLLM))
    without = engine[OURS].generate(120, 1, [None] * ROWS)["tokens"]
    for row, (ours, vllm) in enumerate(zip(own["logprobs"], theirs["logprobs"], strict=True)):
        far = abs(max(ours[0].values()) - max(vllm[0].values()))
        assert far < CLOSE, f"row {row}: log-probabilities {far:.2f} apart"
    assert own["tokens"] != without


def steps(engine, paths):
    """What is timed by case and provider; each returns its seconds."""
    none = [None] * ROWS

    def step(name, case, paths):
        return lambda: engine[name].seconds(*STEPS[case], paths)

    found = {
        f"vllm {case}": {
            NO_LORA: step(NO_LORA, case, none),
            VLLM: step(VLLM, case, paths[16]),
            OURS: step(OURS, case, paths[16]),
            IDLE: step(OURS, case, none),
        }
        for case in STEPS
    }
    found["vllm rank 8, decode"] = {name: step(name, "decode", paths[8]) for name in (NARROW, WIDE)}
    return found


@pytest.fixture(scope="module")
def cases(adapters, rounds):
    """Each case, of all generations."""
    times: dict[str, dict[str, list[float]]] = {}
    asked = rounds(31, 31)
    generations = min(GENERATIONS, asked.fewest)
    work = {}
    for _ in range(generations):
        with engines() as engine:
            check(engine, adapters[16])
            each = -(-asked.fewest // generations)
            for group, providers in steps(engine, adapters).items():
                taken = take_turns(list(providers.values()), fewest=each, most=each, seconds=0)
                for name, seconds in zip(providers, taken, strict=True):
                    times.setdefault(group, {}).setdefault(name, []).extend(seconds)
            work = {name: engine[name].work() for name in (NARROW, WIDE)}
    info = dict(model="SmolLM2-135M", rows=ROWS, L=SLOTS, R=16, generations=generations)
    info["steps"] = {case: dict(tokens=tokens, new=new) for case, (tokens, new) in STEPS.items()}
    return {group: Case(group, taken, info={**info, "work": work}) for group, taken in times.items()}


@pytest.mark.parametrize("provider", (NO_LORA, VLLM, OURS, IDLE))
@pytest.mark.parametrize("case", STEPS)
def test_step(replay, cases, case, provider):
    replay(cases[f"vllm {case}"], provider)


@pytest.mark.parametrize("provider", (NARROW, WIDE))
def test_live_ranks(replay, cases, provider):
    case = cases["vllm rank 8, decode"]
    assert case.info["work"][NARROW]["bytes"] == case.info["work"][WIDE]["bytes"]
    assert case.info["work"][NARROW]["flops"] == case.info["work"][WIDE]["flops"]
    replay(case, provider)
