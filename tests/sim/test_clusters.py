"""The host executor with clusters of blocks that read each other's shared memory."""

import re
from itertools import pairwise

import pytest
import torch

from lora_kernels import _sim

kernels = _sim.self_test


def cluster_sum(cluster, clusters=3, n=40, first=True, last=True):
    """Whether the sum is right."""
    x = torch.randint(-9, 10, (cluster * clusters, n)).float()
    y = torch.empty_like(x)
    kernels.cluster_sum(cluster, x, y, first, last)
    expected = x.view(clusters, cluster, n).flip(2).sum(1, keepdim=True).expand(-1, cluster, -1)
    return torch.equal(y.view(clusters, cluster, n), expected)


@pytest.mark.parametrize("cluster, grid", ((1, (3, 1, 1)), (3, (6, 2, 1)), (8, (8, 2, 2))))
def test_ranks(seed, cluster, grid):
    blocks = torch.Size(grid).numel()
    y = torch.full((blocks, 32), 77, dtype=torch.int32)
    kernels.ranks(cluster, grid, y)
    assert torch.equal(y, (torch.arange(blocks).int() % cluster)[:, None].expand(-1, 32))


@pytest.mark.parametrize("cluster", (1, 2, 4, 7, 8))
def test_sum_of_a_cluster(seed, cluster):
    assert cluster_sum(cluster)
    assert cluster_sum(cluster, clusters=1, n=1)
    assert cluster_sum(cluster, clusters=1, n=1023)


def test_a_missing_first_barrier_is_seen():
    for seed in range(5):
        _sim.set_seed(seed)
        assert not cluster_sum(4, first=False)


def test_a_missing_last_barrier_is_seen():
    for seed in range(4):
        _sim.set_seed(seed)
        with pytest.raises(RuntimeError, match=r"in_block of block \(\d+, 0, 0\), which has ended"):
            cluster_sum(4, last=False)


def test_reads_of_a_block_that_ended():
    """Through an address taken before."""
    late = []
    for seed in range(5):
        _sim.set_seed(seed)
        y = torch.zeros(64)
        kernels.read_late(y)
        assert (y.isnan() | (y == 1)).all()
        late.append(bool(y.isnan().any()))
    assert sum(late) >= 3


def test_orders_of_blocks():
    def order(seed):
        _sim.set_seed(seed)
        order, came = torch.full((24,), -1, dtype=torch.int32), torch.zeros(1).int()
        kernels.cluster_order(4, order, came, 6)
        assert sorted(order.tolist()) == sorted([*range(4)] * 6)
        return order.tolist()

    orders = [order(seed) for seed in range(9)]
    assert orders[0] == [block for block in range(4) for _ in range(6)]
    assert orders[2] == orders[0][::-1]
    assert len({tuple(order) for order in orders}) >= 7
    assert order(4) == orders[4]
    changes = [sum(a != b for a, b in pairwise(order)) for order in orders]
    assert changes[3] == 3  # each block as far as it can go
    assert changes[4] > 8


@pytest.mark.parametrize("at", (256, 256 + 1000, -1, -1000))
def test_writes_beside_shared_memory_of_a_cluster(at, seed):
    kernels.write_shared_of_cluster(256, 255)
    place = "before its" if at < 0 else f"at byte {at} of its 256 bytes of"
    with pytest.raises(RuntimeError, match=rf"block \(1, 0, 0\) wrote {place} shared memory"):
        kernels.write_shared_of_cluster(256, at)


BLOCK_0 = r"\n block .0, 0, 0.:\n  "
BLOCK_1 = r"\n block .1, 0, 0.:\n  "
AT = r"at cluster_barrier \(self_test_clusters.cuh:\d+\)"
FAULTS = {
    "block_and_cluster": rf"^blocks .0, 0, 0. to .1, 0, 0.: deadlock, no thread can go on{BLOCK_0}{AT}: thread 0 to 63"
    rf"{BLOCK_1}{AT}: thread 0 to 31\n  at __syncthreads \(self_test_clusters.cuh:\d+\): thread 32 to 63$",
    "two_cluster_barriers": rf"^thread 0 of block .1, 0, 0.: {AT}, the others at another barrier"
    rf"{BLOCK_0}{AT}: thread 0 to 63{BLOCK_1}this one: thread 0\n  can go on: thread 1 to 63$",
    "lanes_and_cluster": rf"^thread 16 of block .0, 0, 0.: {AT}, where lanes do not meet it{BLOCK_0}at __syncwarp",
    "rank_outside": "^thread 0 of block .0, 0, 0.: in_block of block 2 of a cluster of 2$",
    "address_outside": "^thread 0 of block .0, 0, 0.: in_block of an address outside its shared memory$",
    "ended_block": "^thread 0 of block .1, 0, 0.: in_block of block .0, 0, 0., which has ended$",
    "copy_to_another": "^thread 0 of block .0, 0, 0.: cp.async at byte .* of 256 bytes of shared memory$",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_cluster(fault, seed):
    with pytest.raises(RuntimeError) as caught:
        kernels.cluster_faulty(fault, torch.empty(64))
    said = str(caught.value)
    if seed == 0:
        assert re.search(FAULTS[fault], said), said
    assert re.match(r"thread \d+ of block \([01], 0, 0\): |blocks \(0, 0, 0\) to \(1, 0, 0\): deadlock", said)
    assert cluster_sum(2)  # nothing is left of the launch that failed


@pytest.mark.parametrize("cluster, blocks", ((0, 4), (3, 4), (9, 9), (16, 16), (8, 4)))
def test_clusters_a_gpu_refuses(cluster, blocks):
    kernels.launch_clusters(4, 8)
    with pytest.raises(RuntimeError, match=f"cannot launch a grid of .* blocks in clusters of {cluster}:"):
        kernels.launch_clusters(cluster, blocks)
