"""``benchmarks/gpu_run.sh`` without a GPU: the same path, tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def gpu_run(out, *arguments):
    command = [ROOT / "benchmarks" / "gpu_run.sh", out, *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)


def test_dry_run_measures_every_kind_of_case(tmp_path):
    for stage in ("tests", "bench"):
        done = gpu_run(tmp_path, "--dry-run", "--only", stage)
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_low_rank.json").read_text())
    assert {case["rank"] for case in found["cases"]} == {16, "mixed"}
    assert all(case["bytes"] > 0 and "lora_kernels" in case["providers"] for case in found["cases"])
    assert "skipped" in (tmp_path / "tests.log").read_text()
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


def test_what_cannot_run_is_no_success(tmp_path):
    for arguments in (("--only", "bnech"), ("--dry-run", "--only", "memcheck"), ("--bench",)):
        assert gpu_run(tmp_path, *arguments).returncode != 0
    if not torch.cuda.is_available():
        assert "sees no GPU" in gpu_run(tmp_path).stderr
