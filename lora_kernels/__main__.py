"""The command line: ``lora-kernels``, or ``python -m lora_kernels``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from . import demo
from ._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process where None.

    Returns:
        The exit status: 0; 1 where the command found something wrong; 2 where the user's input is.
    """
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"lora-kernels: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lora-kernels", description="Fast kernels for LoRA-family adapters.")
    parser.add_argument("--version", action="version", version=f"lora_kernels {__version__}")
    parser.add_argument("--traceback", action="store_true", help="where an error comes from, not one line")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, readable: bool = True):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(command=run)
        if readable:
            command.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else there")
        return command

    demo.add_arguments(
        add("demo", demo.run, "eight adapters answer in one batch, with PEFT and with the kernels", False)
    )
    add("info", _info, "which backend runs each op here, and why not the others")
    check = add("check", _check, "hold every backend and instruction set here to the error rule, against float64")
    check.add_argument("--family", default="low_rank", help="the ops to check (default: %(default)s)")
    check.add_argument(
        "--dtype", action="append", metavar="NAME", help="fp32, bf16, ...; may be repeated (default: all)"
    )
    check.add_argument("--full", action="store_true", help="every sample, which takes minutes")
    bench = add("bench", _bench, "time the kernels beside their rivals, from a checkout", False)
    bench.add_argument("family", nargs="?", help="low_rank, peft, ... (default: all)")
    bench.add_argument("-k", metavar="EXPRESSION", help="only these, as pytest takes it")
    bench.add_argument("--quick", action="store_true", help="a few rounds a case: to see it run, not to measure")
    bench.add_argument("--save", action="store_true", help="keep the results in benchmarks/results/<device>/")
    add("collect-env", _collect_env, "what a bug report needs to know of this machine")
    return parser


def _info(args: argparse.Namespace) -> int:
    from ._info import info

    found = info()
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 0


def _check(args: argparse.Namespace) -> int:
    from .check import check

    with _progress() as progress:
        report = check(args.family, full=args.full, dtypes=args.dtype, progress=progress)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.passed else 1


def _collect_env(args: argparse.Namespace) -> int:
    from .collect_env import as_text, collect_env

    env = collect_env()
    print(json.dumps(env, indent=2) if args.json else as_text(env))
    return 0


def _bench(args: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[1]
    files = {path.stem.removeprefix("bench_"): path for path in sorted((root / "benchmarks").glob("bench_*.py"))}
    if not files:
        raise FileNotFoundError(
            "the benchmarks are not in an installed wheel: take a checkout of the sources and pip install -e . there"
        )
    if args.family is not None and args.family not in files:
        raise ValueError(f"no benchmarks are called {args.family!r}; there are {', '.join(files)}")
    if missing := [name for name in ("pytest", "pytest_benchmark", "rich") if find_spec(name) is None]:
        raise ImportError(f"the benchmarks need {', '.join(missing)}: pip install 'lora_kernels[bench]'")
    chosen = files.values() if args.family is None else [files[args.family]]
    options = [f"--{name}" for name in ("quick", "save") if getattr(args, name)] + (["-k", args.k] if args.k else [])
    # `python -m pytest` in the checkout imports the package from it; the run prints its table at the end.
    command = [sys.executable, "-m", "pytest", "--benchmark-only", *options, *map(str, chosen)]
    return 1 if subprocess.run(command, cwd=root).returncode else 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """``progress(done, total, what)`` on stderr: a bar where rich is installed and someone looks, else a few lines."""
    if find_spec("rich") is None or not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _lines() -> Callable[[int, int, str], None]:
    said = 0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal said
        if total and done * 10 // total > said:
            said = done * 10 // total
            print(f"{done} of {total} samples", file=sys.stderr)

    return progress


if __name__ == "__main__":
    sys.exit(main())
