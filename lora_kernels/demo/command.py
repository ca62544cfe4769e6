"""The demo from start to end: a model, its adapters, their answers, the times."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import lora_kernels

from . import adapters, measure, model, report
from .loading import Adapter, attach, from_directories


def demo(args: argparse.Namespace) -> int:
    """Run the demo; see :func:`lora_kernels.demo.run`."""
    _check(args)
    device = model.device(args.device)
    start = time.perf_counter()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = report.console(args.json)
    path, base, tokenizer = _load(args, device, console)
    chosen = from_directories(args.adapters) if args.adapters else _make(args, path, base, tokenizer, console)
    peft_model = attach(base, chosen)
    result = _answer(args, path, peft_model, tokenizer, chosen, console)
    if not args.json:
        console.print(report.answers(result))
    if not args.no_times:
        with _bar(console) as bar:
            task = bar.add_task("timing", total=len(measure.CASES), note="")
            names = [adapter.name for adapter in chosen]
            result.times = measure.times(peft_model, names, progress=lambda: bar.advance(task))
        if not args.json:
            console.print(report.times(result))
    if args.json:
        print(json.dumps(result.as_dict(), ensure_ascii=False))
    console.print(f"[dim]{time.perf_counter() - start:.0f} seconds in all[/]")
    return 0 if result.equal else 1


def _check(args: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if not args.prompt.strip():
        raise ValueError("--prompt is empty")
    if args.model is not None and not args.adapters:
        raise ValueError("--model needs --adapters: the demo's own adapters fit only its own model")


def _load(args: argparse.Namespace, device: torch.device, console: Console) -> tuple[Path, Any, Any]:
    path = args.model or model.bundled_model(args.fresh, lambda text: console.print(text, style="dim"))
    with console.status(f"loading {path.name}"):
        return path, *model.load(path, device)


def _make(args: argparse.Namespace, path: Path, base: Any, tokenizer: Any, console: Console) -> list[Adapter]:
    training = adapters.Training()
    with _bar(console) as bar:
        tasks: dict[str, Any] = {}

        def progress(voice: str, step: int, loss: float) -> None:
            if voice not in tasks:
                tasks[voice] = bar.add_task(f"training {voice}", total=training.steps, note="")
            bar.update(tasks[voice], completed=step, note=f"loss {loss:.2f}")

        return adapters.make(path, base, tokenizer, training=training, fresh=args.fresh, progress=progress)


def _answer(
    args: argparse.Namespace, path: Path, peft_model: Any, tokenizer: Any, chosen: list[Adapter], console: Console
) -> report.Result:
    names = [measure.BASE, *(adapter.name for adapter in chosen)]
    prompts = [model.chat(tokenizer, args.prompt)] * len(names)
    with console.status("PEFT answers"):
        theirs = measure.answer(peft_model, tokenizer, prompts, names, args.max_new_tokens)
    handle = lora_kernels.patch(peft_model)
    try:
        with console.status("the patched model answers"):
            ours = measure.answer(peft_model, tokenizer, prompts, names, args.max_new_tokens)
        with torch.no_grad():
            layers = handle.report()
    finally:
        handle.unpatch()
    differences = measure.first_difference(ours, theirs)
    whats = ["no adapter", *(adapter.what for adapter in chosen)]
    ranks = [0, *map(adapters.rank_of, chosen)]
    rows = [
        report.Row(name, what, rank, _text(tokenizer, tokens), int((tokens != tokenizer.pad_token_id).sum()), differs)
        for name, what, rank, tokens, differs in zip(names, whats, ranks, ours, differences, strict=True)
    ]
    return report.Result(
        model=str(args.model or model.bundled_file().stem),
        prompt=args.prompt,
        threads=torch.get_num_threads(),
        instruction_set=measure.instruction_set(peft_model.device),
        fast_layers=layers.fast,
        total_layers=layers.total,
        layers=str(layers).splitlines()[0] if layers.fast == layers.total else str(layers),
        rows=rows,
        device=str(peft_model.device),
    )


def _text(tokenizer: Any, tokens: torch.Tensor) -> str:
    return " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        yield bar
