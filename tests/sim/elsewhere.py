"""Tests run in another process, with another build of lora_kernels._sim."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import lora_kernels

ROOT = Path(__file__).resolve().parents[2]
#: Runs first in the process under test: the module is the one given, wherever the package is from.
PROLOGUE = """
import importlib.util
import sys
import torch
import lora_kernels
spec = importlib.util.spec_from_file_location("lora_kernels._sim", sys.argv[1])
lora_kernels._sim = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lora_kernels._sim)
"""
PYTEST = """
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def build(**options):
    """The module csrc/sim/build.py builds with these options."""
    spec = importlib.util.spec_from_file_location("sim_build", ROOT / "csrc/sim/build.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.build(**options)


def run(module, code, *arguments, **variables):
    """Run Python code with this build of the module."""
    package = Path(lora_kernels.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    command = [sys.executable, "-c", PROLOGUE + code, *map(str, [module, *arguments])]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def run_tests(module, *arguments, **variables):
    quick = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return run(module, PYTEST, "-q", "-p", "no:cacheprovider", *arguments, **quick, **variables)
