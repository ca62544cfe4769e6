"""Mistakes in the ``low_rank`` kernels, each noticed by a test."""

import pytest
from mutation import unnoticed

LOW_RANK = "include/lora_kernels/low_rank.cuh"
GROUPED = "include/lora_kernels/grouped.cuh"
CLUSTER = "include/lora_kernels/low_rank_cluster.cuh"
FRAGMENTS = "include/lora_kernels/fragments.cuh"
TESTS = "tests/sim/test_low_rank.py"
QUICK = {
    "shrink: sums read too soon": (
        LOW_RANK,
        "acc[i][j];\n    __syncthreads();",
        "acc[i][j];\n    __syncwarp();",
        "bf16-decode",
    ),
    "shrink: off by one": (LOW_RANK, "p.A.rank + r] = v[i]", "p.A.rank + r + 1] = v[i]", "bf16-runs"),
    "expand: no wait": (LOW_RANK, "wait_copies<0>();", "", "bf16-decode"),
    "tiles: wrong mask": (GROUPED, "__ballot_sync(0xffffffff, place", "__ballot_sync(0x0000ffff, place", "bf16-runs"),
    "fragments exchanged": (
        FRAGMENTS,
        "a8.pair(j), a.pair(j + 1), a8",
        "a.pair(j + 1), a8.pair(j), a8",
        "bf16-decode",
    ),
    "cluster: parts read too soon": (CLUSTER, "cluster_barrier();\n\n", "\n", "one_launch and bf16-decode"),
    "cluster: another's part": (CLUSTER, "chunk % kCluster);", "(chunk + 1) % kCluster);", "one_launch and bf16-wide"),
    "no mistake": (LOW_RANK, "v[i] += sum", "v[i] = v[i] + sum", "bf16-decode"),
}
MORE = {
    "cluster: left too soon": (
        CLUSTER,
        "cluster_barrier();  // the others may still read what is here",
        "",
        "one_launch and (bf16-decode or bf16-wide)",
    ),
    "shrink: sums written too soon": (LOW_RANK, "if (c) __syncthreads();", "", "forms_agree and 300"),
    "shrink: past the live rank": (LOW_RANK, "min(whole, ranks.at(slice, adapter, whole))", "whole", "bf16-live-ranks"),
    "expand: no barrier": (LOW_RANK, "wait_copies<0>();\n    __syncthreads();", "wait_copies<0>();", "bf16-decode"),
    "expand: v written too soon": (LOW_RANK, "if (done) __syncthreads();", "", "bf16-m129"),
    "expand: off by one": (LOW_RANK, "wide, width - column, sum", "wide, width - column + 1, sum", "bf16-y-columns"),
    "expand: wrong columns": (LOW_RANK, "lane / 8 % 2;  // the column", "lane / 16 % 2;  // the column", "bf16-decode"),
    "plan: no barrier": (GROUPED, "i;\n    __syncthreads();", "i;", "test_plan and 700"),
}


def test_mistakes(tmp_path):
    assert unnoticed(tmp_path, QUICK, "low_rank", TESTS) == ["no mistake"]


@pytest.mark.slow
def test_more_mistakes(tmp_path):
    assert unnoticed(tmp_path, MORE, "low_rank", TESTS) == []
