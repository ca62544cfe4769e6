"""A vLLM engine in a process of its own, asked over a pipe: several of them can take turns on one machine.

python benchmarks/engine.py      # reads one request a line, answers each with one line, in JSON; for `Engine` only
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VOCABULARY = range(1000, 40000)  # tokens of random prompts


class Engine:
    """One engine; its methods are calls of :class:`_Worker`'s.

    Args:
        model: a directory that vLLM loads.
        plugin: whether lora_kernels computes its LoRA.
        environment: variables besides those that are set.
        options: of ``vllm.LLM``.
    """

    def __init__(self, model: Path, *, plugin: bool = True, environment: Mapping[str, str] = {}, **options: Any):
        environment = {
            **os.environ,
            **environment,
            "LORA_KERNELS_VLLM": str(int(plugin)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._ask("start", model=str(model), **options)

    def generate(self, tokens: int, new: int, adapters: Sequence[Path | None], logprobs: int | None = None) -> Any:
        """Seconds for one prompt of ``tokens`` random tokens for each of ``adapters``, and what was generated."""
        paths = [path and str(path) for path in adapters]
        return self._ask("generate", tokens=tokens, new=new, adapters=paths, logprobs=logprobs)

    def seconds(self, tokens: int, new: int, adapters: Sequence[Path | None]) -> float:
        """:meth:`generate`, its time only."""
        return self.generate(tokens, new, adapters)["seconds"]

    def work(self) -> dict[str, int]:
        """What a row of each loaded adapter reads and computes, by the live ranks that the kernels are told."""
        return self._ask("work")

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(30)

    def _ask(self, what: str, **request: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # then the answer is missing too
            print(json.dumps([what, request]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()  # type: ignore[union-attr]
        if not answer:
            raise RuntimeError(f"the engine ended at {what!r} with exit status {self._process.wait()}")
        return json.loads(answer)


class _Worker:
    """What happens in the process."""

    def start(self, model: str, **options: Any) -> None:
        from vllm import LLM

        self.llm = LLM(model=model, enable_prefix_caching=False, disable_log_stats=True, **options)
        self.ids = itertools.count(1)
        self.requests: dict[str, Any] = {}

    def generate(self, tokens: int, new: int, adapters: list[str | None], logprobs: int | None) -> dict[str, Any]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": random.Random(row).sample(VOCABULARY, tokens)} for row in range(len(adapters))]
        wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=logprobs)
        requests = [path and self.request(path) for path in adapters] if any(adapters) else None
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, wanted, lora_request=requests, use_tqdm=False)
        seconds = time.perf_counter() - start
        rows = [output.outputs[0] for output in outputs]
        found = [[{token: p.logprob for token, p in step.items()} for step in row.logprobs or ()] for row in rows]
        return {"seconds": seconds, "tokens": [list(row.token_ids) for row in rows], "logprobs": found}

    def request(self, path: str) -> Any:
        from vllm.lora.request import LoRARequest

        if path not in self.requests:
            self.requests[path] = LoRARequest(Path(path).name, next(self.ids), path)
        return self.requests[path]

    def work(self) -> dict[str, int]:
        from lora_kernels.integrations._vllm_wrapper import stack_of

        read = flops = padded = 0
        for layer in self.llm.apply_model(_lora_layers)[0]:
            for stacked in (layer.lora_a_stacked, layer.lora_b_stacked):
                if (stack := stack_of(stacked)) is None:
                    continue
                for factor, ranks in zip(stack.factors, stack.ranks, strict=True):
                    width = factor[0].numel() // stack.max_rank
                    live = int(ranks.sum()) * width
                    read += live * factor.element_size()
                    padded += factor.numel() * factor.element_size()
                    flops += 2 * live
        return {"bytes": read, "flops": flops, "padded_bytes": padded}


def _lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_a_stacked")]


def _serve() -> None:
    """Answer until the pipe is closed. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        what, request = json.loads(line)
        print(json.dumps(getattr(worker, what)(**request)), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
