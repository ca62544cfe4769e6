"""Each thing rung 5 is to see of CUDA, in a kernel that has just that, and none of it in the one beside it."""

import re

import nvcc
import pytest
from nvcc import Limit, Resources, faults, kernels

SOURCE = """
#include "lora_kernels/device.cuh"
namespace lora_kernels {
namespace {
template <class T, int N>
__global__ void copy_kernel(T* out, const T* in) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i * blockDim.x + threadIdx.x] = in[i * blockDim.x + threadIdx.x];
}
template __global__ void copy_kernel<bf16, 1>(bf16*, const bf16*);
template __global__ void copy_kernel<uint4, 2>(uint4*, const uint4*);

__global__ void __launch_bounds__(1024, 2) spilling_kernel(float* out, const float* in) {
  float kept[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) kept[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) out[(199 - i) * 1024 + threadIdx.x] = kept[i] * kept[(i * 7) % 200];
}

__global__ void multiply_kernel(float* out, const void* in) {
  __shared__ __align__(16) unsigned char block[1024];
  copy_async(block + 16 * threadIdx.x, static_cast<const unsigned char*>(in) + 16 * threadIdx.x);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  uint32_t a[4];
  float d[4] = {};
  load_matrices(a, block + 16 * (threadIdx.x % 32));
  mma_bf16(d, a, {a[0], a[1]});
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}

__global__ void double_kernel(double* out, int* count) {
  out[threadIdx.x] *= 3;
  atomicAdd(count, 1);
}
}  // namespace
}  // namespace lora_kernels
"""
WIDE, SCALAR, SPILLING = "copy_kernel<uint4, 2>", "copy_kernel<bf16, 1>", "spilling_kernel"


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def found(request, tmp_path_factory):
    source = tmp_path_factory.mktemp("nvcc") / "seen.cu"
    source.write_text(SOURCE)
    return kernels(nvcc.cubin(source, request.param, source.parent))


def test_names(found):
    assert list(found) == [SCALAR, WIDE, "double_kernel", "multiply_kernel", SPILLING]


def test_resources(found):
    assert found[SCALAR].opcodes == "LDG.16 STG.16"
    assert found[WIDE].opcodes == "LDG.128 STG.128"
    assert found["double_kernel"].opcodes.startswith("DMUL LDG.64 RED")
    assert {"HMMA", "LDGSTS.128", "LDSM", "STG.32"} <= {*found["multiply_kernel"].opcodes.split()}
    assert found["multiply_kernel"].shared >= 1024
    assert found[WIDE].shared <= 1024  # what the system takes of each block
    for name, kernel in found.items():
        assert bool(kernel.spills) == bool(kernel.stack) == (name == SPILLING)
        assert 8 <= kernel.registers <= 32


def test_faults(found):
    limits = (Limit(r"copy_kernel<.*", 32, "LDG.128|LDGSTS.128"), Limit(".*", 255))
    assert faults(found, limits) == [
        f"{SCALAR}: has no LDG.128|LDGSTS.128, only LDG.16 STG.16",
        f"{SPILLING}: spills ({found[SPILLING].stack} bytes of stack, {found[SPILLING].spills} accesses)",
    ]
    assert faults({"a": Resources(33)}, [Limit("a", 32, "HMMA"), Limit("ab", 32)]) == [
        "a: takes 33 registers of 32",
        "a: has no HMMA, only nothing",
        "no kernel is called ab",
    ]
    assert not faults({"a": Resources(32, stack=8, spills=4)}, [Limit("a", 32, stack=8)])
    assert faults({"a": Resources(32, stack=16)}, [Limit("a", 32, stack=8)])
    assert faults({"ab": Resources(33)}, [Limit("b", 32)]) == ["ab: no limit is for it", "no kernel is called b"]


def test_what_is_kept(tmp_path):
    source = tmp_path / "kept.cu"
    source.write_text("__global__ void kernel(int* x) { *x = 1; }")
    first = nvcc.cubin(source, "sm_90", tmp_path)
    time = first.stat().st_mtime_ns
    assert nvcc.cubin(source, "sm_90", tmp_path).stat().st_mtime_ns == time
    source.write_text(source.read_text().replace("1", "2"))
    assert nvcc.cubin(source, "sm_90", tmp_path) != first
    assert not first.exists()
    source.write_text("error")
    with pytest.raises(RuntimeError, match=re.escape("kept.cu for sm_90")):
        nvcc.cubin(source, "sm_90", tmp_path)
