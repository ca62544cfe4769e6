"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the op tests again, in another process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sanitizing import environment

import lora_kernels

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
#: Runs first in the process under test: the package and its extension are the instrumented copy, and it is loaded.
PROLOGUE = """
import sys
from pathlib import Path
import torch
import lora_kernels._C as extension
from lora_kernels.ops import _dispatch
assert _dispatch.extension_error is None, _dispatch.extension_error
assert Path(extension.__file__).parent == Path(sys.argv[1]), extension.__file__
assert "libasan" in Path("/proc/self/maps").read_text()
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory):
    """A copy of the package whose extension is built with both sanitizers; and the variables it needs."""
    preloaded = environment()
    out = tmp_path_factory.mktemp("sanitized")
    # The objects stay, so that only what changed is built again.
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", out, "--build-temp", ROOT / "build/sanitizers"]
    # Optimising what the sanitizers add takes minutes, and the samples are small.
    flags = {"LORA_KERNELS_SANITIZE": "address,undefined", "CXXFLAGS": "-O0 -g1"}
    env = {**os.environ, "LORA_KERNELS_BUILD": "cpu", **flags}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    package = out / "lora_kernels"
    source = Path(lora_kernels.__file__).parent
    shutil.copytree(source, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    (extension,) = package.glob("_C.*")
    assert b"__asan_report_load" in extension.read_bytes()
    assert b"__ubsan_handle" in extension.read_bytes()
    return package, preloaded


def run(instrumented, tmp_path, *arguments):
    """Run tests under the sanitizers; returns how many passed."""
    package, preloaded = instrumented
    script = tmp_path / "run.py"
    script.write_text(PROLOGUE)
    env = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        **preloaded,
    }
    command = [
        sys.executable,
        script,
        package,
        "-q",
        "-x",
        "--capture=no",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *arguments,
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-20_000:]
    assert "Sanitizer" not in report, report[-20_000:]
    assert "runtime error" not in report, report[-20_000:]
    return int(re.search(r"(\d+) passed", report)[1])


NAMES = (
    "low_rank_forward", "low_rank_backward", "low_rank_bad_input", "plan", "layers", "lora_linear",
    "lora_linear_training", "lora_linear_bad_input", "quantized_forward", "quantized_backward", "quantized_bad_input",
    "transforms_kernels", "trigonometric",
    "bgmv_spectral", "spectral_backward", "spectral_bad_input", "spectral_plan",
)  # fmt: skip
FILES = [HERE / f"test_{name}.py" for name in NAMES]


def test_samples(instrumented, tmp_path):
    """Every sample forward and backward in each instruction set, and with threads; masks; bad input; plans; layers."""
    threaded = "low_rank_forward and two_threads and not fp16 and not y32"
    training = "test_lora_linear_training and (two_threads or mask or sizes or shapes) and not reference"
    transforms = "many_rows or (number_of_rows and bf16) or read_as_it_lies or every_base"
    keep = (
        "every_instruction_set or unforced or (test_plan and cpu) or test_layers or test_lora_linear.py "
        f"or compiled_kernels or ({training}) or ({threaded}) "
        f"or (test_transforms_kernels and ({transforms})) or (test_trigonometric and bad_input)"
    )
    assert run(instrumented, tmp_path, *FILES, "-k", keep) > 400


@pytest.mark.slow
def test_everything(instrumented, tmp_path):
    more = [HERE / f"test_low_rank_{name}.py" for name in ("invariance", "properties")]
    assert run(instrumented, tmp_path, *FILES, *more, "-k", "not reference") > 2000
