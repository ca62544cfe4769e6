"""Patched models in DDP and FSDP2, over two processes, wrapped before and after patching."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

from lora_kernels.integrations.peft import FAST
from lora_kernels.ops._dispatch import extension_error

pytestmark = pytest.mark.skipif(extension_error is not None, reason="without the extension every layer is PEFT's")

WORLD = 2

#: configuration -> what is expected of layers under DDP and under an FSDP unit: FAST, or a word of the reason
EXPECTED = {"plain": FAST, "dropout": FAST, "bias": FAST, "DoRA": FAST}

#: What is said of a layer whose factors are sharded by themselves.
FACTORS = "lora_A"

SCENARIOS = [
    (wrap, when, configured)
    for wrap in ("ddp", "whole", "by_layer", "factors", "bases", "flat")
    for when in ("before", "after")
    for configured in (EXPECTED if wrap in ("ddp", "by_layer") else ("plain", "dropout"))
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, by scenario; one run for all tests."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("LORA_KERNELS_BACKEND", None)
    outs = [folder / f"{rank}.json" for rank in range(WORLD)]
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", worker, str(rank), str(WORLD), str(folder / "store"), str(out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(said)
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.parametrize(("wrap", "when", "configured"), SCENARIOS)
def test_trains_as_the_twin(found, wrap, when, configured):
    results = [process[f"{wrap} {when} {configured}"] for process in found]
    for result in results:
        assert "error" not in result, result["error"]
        assert result["losses"] <= 1e-5
        assert result["gradients"] <= 2e-5 * max(1, result["size"])
        if wrap != "flat":  # there each process has a part of them
            assert result["count"] == {"plain": 4, "dropout": 4, "bias": 6, "DoRA": 6}[configured]
        up, down = (result["layers"][f"base_model.model.{name}"] for name in ("up", "down"))
        fast, slow = result["counts"]
        if wrap == "factors":
            assert FACTORS in up
            assert down == FAST
            assert (fast, slow) == (3, 3)
        elif wrap == "flat":  # there a weight is no parameter but a view
            assert (fast, slow) == (0, 6)
        elif EXPECTED[configured] == FAST:
            assert (fast, slow) == (6, 0)
        else:
            assert EXPECTED[configured] in up
            assert (fast, slow) == (0, 6)
    assert results[0]["loss"] != results[1]["loss"]  # each has its own data and masks


def test_wrappers_keep_their_class(found):
    """FSDP2 derives from the class it finds, patched or not; patching derives from what FSDP2 made."""
    for process in found:
        for when in ("before", "after"):
            patched, plain = process[f"by_layer {when} plain"]["classes"]
            assert plain == "FSDPLinear"
            assert "FSDP" in patched
            assert "Fused" in patched
