"""``lora-kernels demo``: eight adapters answer in one batch, with PEFT and with the kernels.

A small language model and its adapters are made here from one PyPI package and a few built-in texts; ``--model`` and
``--adapters`` show the user's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

REQUIRED = ("transformers", "peft", "safetensors", "rich")
DEFAULT_PROMPT = "What is the moon?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to ``parser``."""
    add = parser.add_argument
    add("--model", type=Path, metavar="PATH", help="a transformers model directory or a .gguf file; default: SmolLM2")
    add("--adapters", type=Path, nargs="+", metavar="DIR", help="PEFT LoRA adapters; default: eight made here")
    add("--prompt", default=DEFAULT_PROMPT, help="what every adapter answers (default: %(default)r)")
    add("--max-new-tokens", type=int, default=40, metavar="N", help="length of an answer (default: %(default)s)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is a GPU)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    add("--fresh", action="store_true", help="unpack the model and train the adapters again, whatever is cached")
    add("--no-times", action="store_true", help="answers only")
    add("--json", action="store_true", help="one JSON object on stdout and nothing else there")


def run(args: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        args: what :func:`add_arguments` parsed.

    Returns:
        The exit status: 0, or 1 where the patched model's tokens differ from PEFT's.

    Raises:
        ValueError: an option, the model or an adapter can't be used; the text says which and why.
        FileNotFoundError: a file that was named, or the bundled model, is missing.
        ImportError: a package that the demo needs is not installed.
    """
    from importlib.util import find_spec

    if missing := [name for name in REQUIRED if find_spec(name) is None]:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install {' '.join(missing)}")
    from .command import demo

    return demo(args)
