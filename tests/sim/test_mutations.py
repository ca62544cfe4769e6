"""Mistakes in the executor's own kernels and in PTX's meaning on the host, each noticed by a test."""

from mutation import unnoticed

KERNELS = "sim/self_test.cuh"
CLUSTERS = "sim/self_test_clusters.cuh"
PTX = "include/lora_kernels/ptx.cuh"
TESTS = ("tests/sim/test_executor.py", "tests/sim/test_clusters.py")
MISTAKES = {
    "no barrier": (KERNELS, "if (BARRIER) __syncthreads();\n    __syncwarp();", "__syncwarp();", "two_barriers_a_step"),
    "off by one": (KERNELS, "part[i] = x[first + i];", "part[i + 1] = x[first + i];", "barrier"),
    "wrong mask": (KERNELS, "_xor_sync(mask, sum, d)", "_xor_sync(0x0000ffffu, sum, d)", "halves_of_a_warp"),
    "wait for less": (KERNELS, "wait_copies<1>()", "wait_copies<2>()", "copies_a_step_ahead"),
    "fragments": (PTX, "g + i % 2 * 8][t * elements + i / 2", "g + i / 2 * 8][t * elements + i % 2", "every_place"),
    "no cluster barrier": (CLUSTERS, "if (LAST) cluster_barrier()", "if (LAST) __syncthreads()", "sum_of_a_cluster"),
    "another rank": (PTX, "simt::in_block(shared, rank)", "simt::in_block(shared, 0 * rank)", "sum_of_a_cluster"),
    "no mistake": (KERNELS, "sum += row", "sum = sum + row", "two_barriers_a_step"),
}  # fmt: skip


def test_mistakes(tmp_path):
    assert unnoticed(tmp_path, MISTAKES, "self_test", *TESTS) == ["no mistake"]
