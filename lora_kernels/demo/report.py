"""What the demo prints: rich tables for people, one JSON object for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .measure import CACHED, ROWS, Timing

BUSY = 1.5  # a spread of the base model's own times that quiet machines do not show


@dataclass(frozen=True)
class Row:
    """One row of the mixed batch; ``differs_at`` is the first token that is not PEFT's, None where all are."""

    adapter: str
    what: str
    rank: int
    answer: str
    tokens: int
    differs_at: int | None


@dataclass
class Result:
    """All that the demo found out."""

    model: str
    prompt: str
    threads: int
    instruction_set: str
    fast_layers: int
    total_layers: int
    layers: str
    rows: list[Row]
    times: list[Timing] = field(default_factory=list)
    device: str = "cpu"

    @property
    def equal(self) -> bool:
        """Whether every token of every row is PEFT's."""
        return all(row.differs_at is None for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For ``json.dumps``; times in seconds."""
        return {**asdict(self), "equal": self.equal}


def answers(result: Result) -> RenderableType:
    """The table of answers, and whether they are PEFT's."""
    table = Table(title=Text(f"{result.prompt!r}, one mixed batch of {len(result.rows)} rows"), title_justify="left")
    table.add_column("adapter", style="bold", no_wrap=True)
    table.add_column("rank", justify="right")
    table.add_column("what it does", style="dim", max_width=24, overflow="fold")
    table.add_column("answer", ratio=1)
    for row in result.rows:
        table.add_row(Text(row.adapter), str(row.rank or ""), Text(row.what), Text(row.answer))
    return Group(table, *verdict(result))


def verdict(result: Result) -> list[Text]:
    """How many layers run fast, and the comparison with PEFT token for token."""
    tokens = sum(row.tokens for row in result.rows)
    lines = [Text(result.layers)]
    if result.equal:
        lines.append(Text(f"All {tokens} tokens of all {len(result.rows)} rows are PEFT's, in fp32.", "bold green"))
    for row in result.rows:
        if row.differs_at is not None:
            lines.append(Text(f"{row.adapter}: token {row.differs_at + 1} is not PEFT's.", "bold red"))
    return lines


def times(result: Result) -> RenderableType:
    """The table of step times."""
    title = "One step in bf16, milliseconds (× base: the model without adapters)"
    table = Table(title=title, title_justify="left")
    table.add_column("rows × tokens", no_wrap=True)
    for name in ("base", "PEFT", "patched", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for timing in result.times:
        table.add_row(
            _case(timing),
            f"{timing.base * 1e3:.0f}",
            f"{timing.peft * 1e3:.0f} ({timing.peft_ratio:.2f}×)",
            f"[bold]{timing.patched * 1e3:.0f} ({timing.patched_ratio:.2f}×)[/]",
            f"{timing.peft / timing.patched:.1f}×",
        )
    rounds = [timing.rounds for timing in result.times]
    on_cpu = f"{result.threads} threads ({result.instruction_set})"
    note = (
        f"Medians of {min(rounds)} to {max(rounds)} rounds, in turns, on "
        f"{on_cpu if result.device == 'cpu' else result.instruction_set}. Decode continues {CACHED} tokens."
    )
    lines = [Text(note, "dim")]
    if max(timing.spread for timing in result.times) > BUSY:
        lines.append(Text("The machine was busy with other work: these times mean little.", "yellow"))
    return Group(table, *lines)


def console(machine_reads: bool) -> Console:
    """Where people read: stdout, or stderr when a program reads stdout."""
    return Console(stderr=machine_reads)


def _case(timing: Timing) -> str:
    phase = "decode" if timing.tokens == 1 else "prefill"
    return f"{phase} {ROWS}×{timing.tokens}, {'mixed' if timing.mixed else 'one adapter'}"
