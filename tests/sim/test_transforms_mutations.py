"""Mistakes in the kernels of ``transforms``, each noticed by a test."""

from mutation import unnoticed

KERNELS = "include/lora_kernels/transforms.cuh"
LAUNCH = "include/lora_kernels/transforms_launch.h"
WHT, PLANS = "test_wht and (4096 or 3d or bases) and fp32", "every_plan and (80 or 1024)"
MISTAKES = {
    "no barrier between passes": (KERNELS, "if (!first) __syncthreads();", "", WHT),
    "no barrier in a base of any order": (KERNELS, "    __syncthreads();\n    if (mine)", "    if (mine)", "base-172"),
    "no transpose": (KERNELS, "return kSecond ? out : 2.f * in - out;", "return out;", "transposed"),
    "two parts of three": (KERNELS, "int part = 2; part >= 0", "int part = 1; part >= 0", "base-172 and fp32"),
    "a step": (LAUNCH, "(stride + (stride >> pad)) * 8", "stride * 8", PLANS),
    "no mistake": (KERNELS, "bits |= 1u << a * a % q", "bits |= 1u << (a * a) % q", WHT),
}  # fmt: skip


def test_mistakes(tmp_path):
    assert unnoticed(tmp_path, MISTAKES, "transforms", "tests/sim/test_transforms.py") == ["no mistake"]
