"""Each thing rung 5 is to see, in a kernel that has just that, and none of it in the one beside it."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from driver import TARGETS, compiling_for, configuration
from lora_kernels.kernels.triton import _device
from resources import Resources, faults, resources
from snapshot import Snapshot
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lora_kernels.ops._dispatch import Op

EACH = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


@triton.jit
def add_rows(x, y, stride, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * stride + tl.arange(0, N)[None, :]
    block = tl.load(x + at)
    total = tl.sum(block, 0)
    tl.store(y + at, block + total[None, :])


@triton.jit
def multiply(x, w, y, K, N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    m, k = tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros([N, N], tl.float32)
    for first in range(0, K, BLOCK_K):
        x_block = tl.load(x + m[:, None] * K + first + k[None, :])
        w_block = tl.load(w + (first + k)[:, None] * N + m[None, :])
        acc = tl.dot(x_block, w_block, acc, input_precision=PRECISION)
    tl.store(y + m[:, None] * N + m[None, :], acc)


def compiled(target, launch):
    with compiling_for(target) as launched:
        launch()
    (kernel,) = launched
    return kernel


def rows(target, M=16, N=128, stride=128, warps=4, dtype=torch.bfloat16):
    def launch():
        x, y = torch.empty(2, M, stride, dtype=dtype)
        add_rows[(1,)](x, y, stride, M=M, N=N, num_warps=warps)

    return compiled(target, launch)


def product(target, N=64, K=4096, dtype=torch.bfloat16, precision="tf32", stages=2):
    def launch():
        x, w, y = torch.empty(N, K, dtype=dtype), torch.empty(K, N, dtype=dtype), torch.empty(N, N)
        multiply[(1,)](x, w, y, K, N=N, BLOCK_K=64, PRECISION=precision, num_warps=4, num_stages=stages)

    return compiled(target, launch)


@EACH
def test_nothing_wrong(target):
    kernel = rows(target)
    found = resources(kernel)
    assert list(found.bits.values()) == [128, 128]
    assert 8 < found.registers < 128
    assert found.matrix == ""
    assert not faults(kernel, found, target, ["*y + at"])
    kernel = product(target)
    found = resources(kernel)
    assert found.shared == kernel.metadata.shared > 0
    assert not faults(kernel, found, target)


@EACH
def test_spills(target):
    kernel = rows(target, M=256, N=128, stride=128, warps=1, dtype=torch.float32)
    found = resources(kernel)
    assert found.spills
    assert [f.split()[0] for f in faults(kernel, found, target)] == ["spills"]


@EACH
def test_narrow_accesses(target):
    kernel = rows(target, stride=131)
    found = resources(kernel)
    assert list(found.bits.values()) == [16, 16]
    assert faults(kernel, found, target, ["*y + at"]) == [f"accesses *y + at by 16 bits, not {target.wide}"]
    assert "called *z; there are *y + at" in faults(kernel, found, target, ["*z"])[0]


@EACH
def test_loads_by_name(target):
    if not Snapshot("low_rank", f"Triton {triton.__version__}").comparable:
        pytest.skip("line numbers are off where Triton counts the lines of its inline assembly")
    assert resources(rows(target)).bits == {"*y + at": 128, "block": 128}
    assert resources(product(target)).bits == {"*y + m[:, None] * N + m[None, :]": 128, "w_block": 128, "x_block": 128}


@EACH
def test_too_much_shared_memory(target):
    kernel = product(target, N=128, dtype=torch.float32, stages=6)
    assert any("shared memory" in fault for fault in faults(kernel, resources(kernel), target))


def test_too_much_tensor_memory():
    target = TARGETS[2]
    kernel = product(target, N=128)
    found = resources(kernel)
    assert (found.tensor_memory, found.matrix) == (128, "UTCHMMA")
    assert not faults(kernel, found, target)
    assert "tensor memory" in faults(kernel, replace(found, tensor_memory=513), target)[0]


@pytest.mark.parametrize("target, opcode", [*zip(TARGETS, ("HMMA", "HGMMA", "UTCHMMA", "v_mfma"), strict=True)])
def test_matrix_instructions(target, opcode):
    assert opcode in resources(product(target, N=128)).matrix


def test_no_matrix_instructions():
    target = TARGETS[0]
    kernel = product(target, dtype=torch.float32, precision="ieee")
    assert "multiplies without matrix instructions" in faults(kernel, resources(kernel), target)


def test_a_configuration_in_words():
    words = configuration(rows(TARGETS[0], warps=2))
    assert words.startswith("add_rows(x: *bf16, y: *bf16, stride: i32, M=16, N=128, num_warps=2")


@EACH
def test_launch_code_is_told_of_the_target(target):
    with compiling_for(target):
        device = torch.empty(1).device
        assert device.type == "meta"
        assert _device.gpu(device) == target.gpu
        assert _device.precision() == ("ieee" if target.name == "gfx942" else "tf32x3")
        assert _device.overlap(device, True)["OVERLAP"] == (target.name in ("sm_90", "sm_100"))


def test_everything_is_restored():
    def state():
        patched = driver._active, JITFunction.__getitem__, Op.__call__, _device.gpu
        return *patched, torch.version.hip, torch.empty(0).device

    before = state()
    with compiling_for(TARGETS[3]):
        assert not set(before) & set(state())
    assert state() == before


def test_a_gpu_that_is_not_there_is_not_made_up():
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        _device.gpu(torch.device("meta"))


def test_snapshot(tmp_path):
    def snapshot():
        return Snapshot("family", "Triton 1.0", tmp_path)

    snapshot().update("sm_80", {"a": Resources(40, 1024), "b": Resources(32, 0, bits={"x": 128})})
    snapshot().update("sm_90", {"a": Resources(50, 0)})
    assert (tmp_path / "family.json").read_text().splitlines()[1:5] == [
        '"compiler": "Triton 1.0",',
        '"sm_80": {',
        '"a": {"registers": 40, "shared": 1024},',
        '"b": {"registers": 32, "bits": {"x": 128}}',
    ]
    assert not snapshot().differences("sm_90", {"a": Resources(50, 0)})
    assert snapshot().differences("sm_80", {"a": Resources(41, 1024), "c": Resources(16, 0)})[:-1] == [
        '- a: {"registers": 40, "shared": 1024}',
        '+ a: {"registers": 41, "shared": 1024}',
        '- b: {"registers": 32, "bits": {"x": 128}}',
        '+ c: {"registers": 16}',
    ]
    assert "make snapshot" in snapshot().differences("sm_100", {"a": Resources(50, 0)})[-1]


def test_a_snapshot_is_of_one_compiler(tmp_path):
    Snapshot("family", "Triton 1.0", tmp_path).update("sm_80", {"a": Resources(1, 0)})
    other = Snapshot("family", "Triton 1.1", tmp_path)
    assert not other.comparable
    other.update("sm_90", {})
    again = Snapshot("family", "Triton 1.1", tmp_path)
    assert again.comparable
    assert list(again.kernels) == ["sm_90"]
