"""``benchmarks/gpu_run.sh`` without a GPU: the same path, tiny shapes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from lora_kernels.select import Gpu

ROOT = Path(__file__).resolve().parents[1]


def gpu_run(out, *arguments, **variables):
    command = [ROOT / "benchmarks" / "gpu_run.sh", out, *arguments]
    env = {**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_dry_run_measures_every_kind_of_case(tmp_path):
    for stage in ("tests", "transforms", "tune", "training", "quantized", "bench"):
        done = gpu_run(tmp_path, "--dry-run", "--only", stage, LORA_KERNELS_PEERS=tmp_path / "nothing")
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_low_rank.json").read_text())
    assert {case["rank"] for case in found["cases"]} == {8, 16, 64, 128, "mixed"}
    assert all(case["bytes"] > 0 and "lora_kernels" in case["providers"] for case in found["cases"])
    assert found["plans"]
    assert {name for case in found["training"] for name in case["us"]} == {"lora_kernels", "torch loop"}
    assert found["left_out"] == 0
    assert found["host"]
    transforms = json.loads((tmp_path / "gpu_transforms.json").read_text())
    for function in ("wht", "dct", "idct", "dht", "haar", "ihaar"):
        assert {row["dtype"] for row in transforms[function]} == {"bfloat16", "float32"}
    layers = json.loads((tmp_path / "gpu_lora_linear.json").read_text())
    assert {step["kind"] for step in layers["steps"]} == {"LoRA", "LoRA, dropout", "DoRA", "DoRA, dropout"}
    for step in layers["steps"]:
        assert {"base", "lora_kernels", "torch"} <= step["us"].keys() == step["launched_us"].keys()
        assert "PEFT" in step["us"] or "PEFT" in step["failed"]
    assert layers["left_out"] == 0
    packed = json.loads((tmp_path / "gpu_quantized.json").read_text())
    assert {row["pass"] for row in packed["layers"]} == {"forward", "gradient"}
    for row in packed["layers"]:
        assert {"lora_kernels", "unpacked", "bf16"} <= row["us"].keys()
    assert packed["left_out"] == 0
    for name, why in found["missing_peers"].items():
        assert f"{name} is not timed: {why}" in (tmp_path / "bench.log").read_text()
    assert set(found["missing_peers"]) == {"vLLM", "SGLang csgmv"}
    assert "skipped" in (tmp_path / "tests.log").read_text()
    assert Gpu(**json.loads((tmp_path / "none.json").read_text())) == Gpu()
    again = gpu_run(tmp_path, "--dry-run", "--only", "bench")
    assert again.stdout == "bench: done before\n"


def test_a_failed_stage_is_told_and_not_taken_as_done(tmp_path):
    blocked = tmp_path / "gpu_low_rank.json"
    blocked.mkdir()
    done = gpu_run(tmp_path, "--dry-run", "--only", "bench")
    assert done.returncode == 1
    assert "bench: FAILED" in done.stdout
    assert "IsADirectoryError" in done.stdout
    assert not (tmp_path / "done--dry-run").exists()


def test_a_stage_ends_at_its_limit_with_all_it_started(tmp_path):
    hangs = tmp_path / "hangs"
    hangs.write_text(f"#!/bin/bash\n(trap '' TERM; exec sleep 60) &\necho $! >{tmp_path}/child\nsleep 60\n")
    soon = tmp_path / "timeout"
    soon.write_text(f'#!/bin/bash\nshift 3\nexec {shutil.which("timeout")} -k 1 1 "$@"\n')
    for file in (hangs, soon):
        file.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    start = time.monotonic()
    done = gpu_run(tmp_path / "out", "--dry-run", "--only", "bench", PYTHON=hangs, PATH=path)
    assert time.monotonic() - start < 30
    assert done.returncode == 1
    assert "bench: FAILED with 124" in done.stdout
    # Whoever adopts it need not have reaped it yet.
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_it_builds_for_the_gpu_there(tmp_path):
    """Whatever the environment says; a dry run builds for the CPU."""
    python = tmp_path / "python"
    python.write_text(
        """#!/bin/bash
[[ $2 == *get_device_capability* ]] && echo 9.0
[ $1 = setup.py ] && echo "$LORA_KERNELS_BUILD for '$TORCH_CUDA_ARCH_LIST'"
exit 0
"""
    )
    (tmp_path / "nvcc").touch()
    for file in ("python", "nvcc"):
        (tmp_path / file).chmod(0o755)
    variables = {"PYTHON": python, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_CUDA_ARCH_LIST": "8.0 8.6"}
    for arguments, want in (((), "cuda for '9.0'\n"), (("--dry-run",), "cpu for ''\n")):
        done = gpu_run(tmp_path / "out", *arguments, "--only", "build", **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "out/build.log").read_text() == want


def test_what_cannot_run_is_no_success(tmp_path):
    for arguments in (("--only", "bnech"), ("--dry-run", "--only", "memcheck"), ("--bench",)):
        assert gpu_run(tmp_path, *arguments).returncode != 0
    if not torch.cuda.is_available():
        assert "sees no GPU" in gpu_run(tmp_path).stderr
