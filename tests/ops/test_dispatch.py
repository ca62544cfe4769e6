"""Which backend a call reaches, and how one is forced."""

import contextvars
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import _dispatch, _low_rank
from lora_kernels.ops._dispatch import Op, forced_backend
from lora_kernels.plan import lora_plan_
from lora_kernels.select import BACKENDS
from lora_kernels.testing import bitwise_equal

ROOT = Path(__file__).resolve().parents[2]
OPS = {"lora_plan_", "lora_add_", "lora_shrink", "lora_expand_", "lora_outer", "lora_grads"}


def call():
    generator = torch.Generator().manual_seed(0)
    x, A, B = (torch.randn(size, generator=generator) for size in ((5, 700), (2, 8, 700), (2, 24, 8)))
    return lk.multi_lora(x, A, B, torch.tensor([0, 1, -1, 1, 0]))


def test_registry():
    assert {op.name for op in Op.registry.values() if op.family == "low_rank"} == OPS
    assert _low_rank.lora_add_.overload.name() == "lora_kernels::lora_add_"
    for op in Op.registry.values():
        assert torch.Tag.pt2_compliant_tag in op.overload.tags
        assert op.overload._schema.is_mutable == op.name.endswith("_")
        assert "reference" in op.backends()
        if op.family == "low_rank":
            assert ("cpu" in op.backends()) == (_dispatch.extension_error is None)


def test_unforced_takes_the_compiled_kernels(monkeypatch):
    """Where the extension is loaded the reference is not called at all."""
    if _dispatch.extension_error is not None:
        pytest.skip(f"needs the compiled extension: {_dispatch.extension_error}")
    with lk.backend("cpu"):
        want = call()
    for op in Op.registry.values():
        monkeypatch.setattr(op, "reference", None)
    assert bitwise_equal(call(), want)


def test_forced_reference_calls_it(monkeypatch):
    called = []
    for op in Op.registry.values():
        original = op.reference
        monkeypatch.setattr(op, "reference", lambda *a, o=original, n=op.name: (called.append(n), o(*a))[1])
    with lk.backend("reference"):
        call()
        lk.BatchPlan.from_ids(torch.tensor([0]), 1)
    assert called == ["lora_add_", "lora_plan_"]


@pytest.mark.parametrize("name", ("triton", "cuda", "sim"))
def test_a_forced_backend_that_cannot_raises(name, monkeypatch):
    monkeypatch.setattr(_dispatch, "simulator", lambda: None)
    y = torch.zeros(2, 3)
    with lk.backend(name), pytest.raises(RuntimeError, match=f"lora_add_: backend '{name}'"):
        lk.bgmv(y, torch.ones(2, 4), torch.ones(1, 2, 4), torch.ones(1, 3, 2), torch.tensor([0, 0]))
    assert not y.any()


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of reference, cpu.*'gpu'"), lk.backend("gpu"):
        pass


def test_forcing_nests_and_ends_with_its_block():
    assert forced_backend() is None
    with lk.backend("reference"):
        with lk.backend("cpu"):
            assert forced_backend() == "cpu"
        assert forced_backend() == "reference"
        with pytest.raises(KeyError), lk.backend("cpu"):
            raise KeyError
        assert forced_backend() == "reference"
    assert forced_backend() is None


def test_forcing_stays_in_its_thread():
    seen = []
    with lk.backend("reference"):
        other = threading.Thread(target=contextvars.Context().run, args=(lambda: seen.append(forced_backend()),))
        other.start()
        other.join()
    assert seen == [None]


def test_both_backends_agree(cpu_backend):
    fast = call()
    with lk.backend("reference"):
        slow = call()
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-4)  # sums of 700 terms
    assert lora_plan_.backends() >= {"reference", "cpu"}


def python(code, **env):
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(lk.__file__).parents[1])]), **env}
    return subprocess.run(command, env=env, cwd=ROOT.anchor, capture_output=True, text=True)


@pytest.mark.parametrize("name", (*BACKENDS[:2], ""))
def test_forced_by_the_environment(name):
    code = "from lora_kernels.ops._dispatch import forced_backend; print(forced_backend())"
    done = python(code, LORA_KERNELS_BACKEND=name)
    assert done.stdout.strip() == (name or "None"), done.stderr


def test_a_mistyped_environment_says_so():
    code = "import torch, lora_kernels as lk; x = torch.ones(1, 1); lk.bgmv(x, x, x[None], x[None], torch.tensor([0]))"
    done = python(code, LORA_KERNELS_BACKEND="gpu")
    assert done.returncode != 0
    assert "'gpu'" in done.stderr.splitlines()[-1]


def test_the_instruction_set_comes_from_the_environment():
    if _dispatch.extension_error is not None:
        pytest.skip(f"needs the compiled extension: {_dispatch.extension_error}")
    code = "import torch, lora_kernels as lk; lk.bgmv; print(torch.ops.lora_kernels_C.get_isa())"
    done = python(code, LORA_KERNELS_ISA="portable")
    assert done.stdout.strip() == "portable", done.stderr


def test_no_extension_no_matter():
    """Without the extension every op still runs, and the reason is kept."""
    code = """
import sys
sys.modules["lora_kernels._C"] = None
import torch, lora_kernels as lk
from lora_kernels.ops import _dispatch
assert _dispatch.extension_error
y = lk.bgmv(torch.zeros(2, 3), torch.ones(2, 4), torch.ones(1, 2, 4), torch.ones(1, 3, 2), torch.tensor([0, -1]))
print(y.tolist())
try:
    with lk.backend("cpu"):
        lk.bgmv(y, torch.ones(2, 4), torch.ones(1, 2, 4), torch.ones(1, 3, 2), torch.tensor([0, -1]))
except RuntimeError as error:
    print(error)
"""
    done = python(code)
    assert done.stdout.splitlines()[0] == "[[8.0, 8.0, 8.0], [0.0, 0.0, 0.0]]", done.stderr
    assert "backend 'cpu' has no kernel for this op here" in done.stdout


def test_importing_the_package_does_nothing():
    code = "import sys, lora_kernels; print('torch' in sys.modules, lora_kernels.__version__)"
    done = python(code)
    assert done.stdout.split()[0] == "False", done.stderr
