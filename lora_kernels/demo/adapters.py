"""The demo's eight adapters: four trained here for seconds, four computed from them, all in PEFT's format."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_kernels

from . import texts
from .loading import CONFIG, WEIGHTS, Adapter
from .model import chat, quiet, replacing

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model."
RANK = 16


@dataclass(frozen=True)
class Training:
    """How a voice is trained: AdamW on batches of ``rows`` examples, the learning rate falling to 0 after ``warm``."""

    steps: int = 16
    rows: int = 3
    rate: float = 4e-3
    warm: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A voice learnt from one answer to each of :data:`texts.QUESTIONS`."""

    what: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Mixed:
    """The weighted sum of trained voices: their factors side by side, so the ranks add up."""

    what: str
    weights: dict[str, float]


@dataclass(frozen=True)
class Noise:
    """A random change of each weight, ``size`` times its norm."""

    what: str
    size: float
    seed: int


RECIPES: dict[str, Trained | Mixed | Noise] = {
    "pirate": Trained("talks like a pirate", texts.PIRATE),
    "letter": Trained("writes a letter", texts.LETTER),
    "json": Trained("answers in JSON", texts.JSON),
    "tale": Trained("tells a fairy tale", texts.TALE),
    "a-bit-pirate": Mixed("0.35 × pirate", {"pirate": 0.35}),
    "pirate-tale": Mixed("0.6 × pirate + 0.6 × tale", {"pirate": 0.6, "tale": 0.6}),
    "no-pirate": Mixed("−1 × pirate", {"pirate": -1.0}),
    "noise": Noise("a random low-rank change", 0.1, 1),
}


def make(
    cache: Path,
    model: Any,
    tokenizer: Any,
    *,
    training: Training = Training(),
    fresh: bool = False,
    progress: Callable[[str, int, float], None] = lambda voice, step, loss: None,
) -> list[Adapter]:
    """The adapters of :data:`RECIPES` for ``model``, from ``cache`` or made now and kept there.

    Args:
        cache: the folder under which a set of adapters is kept, one set for each recipe and training.
        model: a causal language model in fp32; left as it was.
        tokenizer: the model's.
        training: how voices are trained.
        fresh: make them again, whatever the cache has.
        progress: called after each training step with the voice, its step from 1, and the loss.
    """
    folder = cache / f"adapters-{_digest(training)}"
    if fresh or not folder.is_dir():
        questions = [chat(tokenizer, question) for question in texts.QUESTIONS]
        made: dict[str, dict[str, Tensor]] = {}
        with replacing(folder) as new:
            for name, recipe in RECIPES.items():
                if isinstance(recipe, Trained):
                    answers = [_ended(tokenizer, answer) for answer in recipe.answers]
                    examples = list(zip(questions, answers, strict=True))
                    made[name] = train(model, examples, training, partial(progress, name))
                elif isinstance(recipe, Mixed):
                    made[name] = mix([(made[voice], weight) for voice, weight in recipe.weights.items()])
                else:
                    made[name] = perturb(model, next(iter(made.values())), recipe)
                write(new / name, made[name])
    return [Adapter(name, recipe.what, folder / name) for name, recipe in RECIPES.items()]


def train(
    model: Any,
    examples: Sequence[tuple[list[int], list[int]]],
    training: Training,
    progress: Callable[[int, float], None],
) -> dict[str, Tensor]:
    """Train one LoRA adapter with the patched model, loss on the answers only.

    Args:
        examples: pairs of question tokens and answer tokens.
        progress: called after each step with the step from 1, and the loss.

    Returns:
        The adapter's tensors on the CPU under the names that PEFT saves them by.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    generator = torch.Generator().manual_seed(training.seed)
    epochs = math.ceil(training.steps * training.rows / len(examples))
    order = torch.cat([torch.randperm(len(examples), generator=generator) for _ in range(epochs)]).tolist()
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(training.seed)
        peft_model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)).train()
        handle = lora_kernels.patch(peft_model)
        try:
            weights = [weight for weight in peft_model.parameters() if weight.requires_grad]
            optimizer = torch.optim.AdamW(weights, lr=training.rate, weight_decay=0.0)
            for step in range(training.steps):
                batch = [examples[i] for i in order[step * training.rows : (step + 1) * training.rows]]
                loss = _loss(peft_model, batch)
                loss.backward()
                for group in optimizer.param_groups:
                    group["lr"] = training.rate * min((step + 1) / training.warm, 1 - step / training.steps)
                optimizer.step()
                optimizer.zero_grad()
                progress(step + 1, loss.item())
            tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        finally:
            handle.unpatch()
            peft_model.unload().eval()


def mix(parts: Sequence[tuple[dict[str, Tensor], float]]) -> dict[str, Tensor]:
    """Σ wᵢ Bᵢ Aᵢ, never formed: the Aᵢ stacked in rows and the wᵢ Bᵢ in columns."""
    return {
        name: torch.cat([part[name] for part, _ in parts])
        if "lora_A" in name
        else torch.cat([weight * part[name] for part, weight in parts], dim=1)
        for name in parts[0][0]
    }


def perturb(model: Any, like: dict[str, Tensor], recipe: Noise) -> dict[str, Tensor]:
    """Random factors of ``like``'s shapes with E‖B A‖² = (size · ‖W‖)² for each weight W of ``model``."""
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = dict(model.named_parameters())
    tensors = {}
    for name, tensor in like.items():
        factor = torch.randn(tensor.shape, generator=generator)
        if "lora_A" in name:
            tensors[name] = factor / math.sqrt(tensor.shape[1])
        else:
            weight = weights[name.removeprefix(PREFIX).replace(".lora_B", "")]
            tensors[name] = factor * (recipe.size * weight.norm().cpu() / math.sqrt(tensor.numel()))
    return tensors


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Save an adapter of scaling 1 in PEFT's format."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank = next(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM", inference_mode=True)
    config.save_pretrained(str(folder))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def rank_of(adapter: Adapter) -> int:
    """The adapter's rank by its configuration."""
    return json.loads((adapter.path / CONFIG).read_text())["r"]


def _ended(tokenizer: Any, answer: str) -> list[int]:
    """The tokens of an answer with its end."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def _loss(model: Any, batch: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Cross entropy of the answers, rows padded on the left so that they all end together."""
    longest = max(len(question) + len(answer) for question, answer in batch)
    kept = max(len(answer) for _, answer in batch)
    ids, mask, labels = [], [], []
    for question, answer in batch:
        pad = longest - len(question) - len(answer)
        ids.append([0] * pad + question + answer)
        mask.append([0] * pad + [1] * (longest - pad))
        labels.append([-100] * (kept - len(answer)) + answer)
    tensor = partial(torch.tensor, device=model.device)
    out = model(input_ids=tensor(ids), attention_mask=tensor(mask), logits_to_keep=kept + 1, use_cache=False)
    return F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), tensor(labels).flatten())


def _digest(training: Training) -> str:
    recipe = repr((sorted(RECIPES.items()), texts.QUESTIONS, TARGETS, RANK, training))
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]
