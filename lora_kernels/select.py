"""Which backend runs an op: pure functions of what is asked, so that they are tested without the device."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("reference", "cpu", "triton", "cuda", "sim")


@dataclass(frozen=True)
class Choice:
    """A backend and the reason it was taken, or why the one asked for can't be."""

    backend: str | None
    reason: str


def choose(device_type: str, available: frozenset[str], forced: str | None = None) -> Choice:
    """The backend for tensors on ``device_type`` among those ``available`` for the op.

    A forced backend is taken or refused (``backend`` None), never replaced.
    """
    suits = {"cpu": ("cpu", "sim"), "cuda": ("cuda", "triton")}.get(device_type, ())
    if forced is not None:
        if forced not in BACKENDS:
            return Choice(None, f"no backend is called {forced!r}; there are {', '.join(BACKENDS)}")
        if forced != "reference" and forced not in suits:
            return Choice(None, f"backend {forced!r} does not run on {device_type} tensors")
        if forced not in available:
            return Choice(None, f"backend {forced!r} has no kernel for this op here")
        return Choice(forced, "forced")
    for name in suits:
        if name in available and name != "sim":
            return Choice(name, f"the fastest backend for {device_type} tensors here")
    missing = f"no {suits[0]} kernel here" if suits else f"no kernel for {device_type} tensors"
    return Choice("reference", missing)
