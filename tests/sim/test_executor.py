"""The host executor by its own kernels: what CUDA defines, in every order of threads, and what it makes an error."""

import re

import numpy as np
import pytest
import torch

from lora_kernels import _sim

kernels = _sim.self_test
bf16 = torch.bfloat16


def numbers(*shape, low=-9, high=10, dtype=torch.int32):
    return torch.randint(low, high, shape, dtype=dtype)


def signed(x):
    """32-bit masks as torch's int32 holds them."""
    return np.asarray(x, dtype=np.uint32).view(np.int32).tolist()


# Blocks


def test_barrier(seed):
    x, y = torch.randn(4, 96), torch.empty(4, 96)
    kernels.reverse(x, y, 96)
    assert torch.equal(y, x.flip(1))


def relay(barrier):
    x, y, expected = torch.randn(6, 128), torch.empty(128), torch.zeros(128)
    kernels.relay(x, y, barrier)
    for row in x.roll(-32, 1):
        expected += row
    return torch.equal(y, expected)


def test_two_barriers_a_step(seed):
    assert relay(barrier=True)


def test_a_missing_barrier_is_seen():
    right = {}
    for seed in range(5):
        _sim.set_seed(seed)
        right[seed] = relay(barrier=False)
    assert right[0]  # what a test that runs threads in turn would not notice
    assert not any(right[seed] for seed in (1, 2, 3))


@pytest.mark.parametrize("x", (torch.zeros(70), torch.ones(70), torch.arange(70) - 30), ids=("none", "all", "some"))
def test_block_votes(seed, x):
    y = torch.empty(3, 70, dtype=torch.int32)
    kernels.block_votes(x.to(torch.int32), y)
    positive = x > 0
    assert y.tolist() == [[int(v)] * 70 for v in (positive.sum(), positive.any(), positive.all())]


def test_seeds_are_orders():
    def order(seed):
        _sim.set_seed(seed)
        assert _sim.seed() == seed
        x, order, came = numbers(512, low=0, high=4), torch.empty(512, dtype=torch.int32), torch.zeros(1).int()
        kernels.atomics(x, torch.zeros(4).int(), torch.zeros(1), torch.zeros(2).int(), order, came)
        assert sorted(order.tolist()) == list(range(512))
        return order.tolist()

    orders = [order(seed) for seed in range(9)]
    assert orders[0] == list(range(512))
    assert len({tuple(order) for order in orders}) == 9
    assert order(3) == orders[3]
    blocks = [list(dict.fromkeys(i // 128 for i in came)) for came in orders]
    lanes = [[i % 32 for i in came if i // 32 == came[0] // 32] for came in orders]
    assert any(seen != sorted(seen) for seen in blocks)
    assert any(seen != sorted(seen) for seen in lanes)


# Warps


def shuffled(kind, x, mask, argument, width):
    """The CUDA C++ Programming Guide's table of the shuffles."""
    y = x.clone()
    for lane in range(32):
        begin = lane // width * width
        source = {
            "idx": begin + argument % width,
            "up": lane - argument if lane - argument >= begin else lane,
            "down": lane + argument if lane + argument < begin + width else lane,
            "xor": lane ^ argument if lane ^ argument < begin + width else lane,
        }[kind]
        if mask >> lane & 1:
            y[lane] = x[source]
    return y


@pytest.mark.parametrize("mask", (0xFFFFFFFF, 0xFFFF0000, 0x00FF00FF))
@pytest.mark.parametrize("width", (32, 16, 8))
@pytest.mark.parametrize("kind", ("idx", "up", "down", "xor"))
def test_shuffles(seed, kind, width, mask):
    x = numbers(32, low=-(2**62), high=2**62, dtype=torch.int64)
    for argument in (0, 1, 3, 7) if mask != 0xFFFFFFFF else range(32):
        sources = shuffled(kind, torch.arange(32), mask, argument, width).tolist()
        if any(mask >> lane & 1 and not mask >> source & 1 for lane, source in enumerate(sources)):
            continue
        y = torch.empty_like(x)
        kernels.shuffle(("idx", "up", "down", "xor").index(kind), mask, x, y, argument, width)
        assert torch.equal(y, shuffled(kind, x, mask, argument, width)), argument


@pytest.mark.parametrize("mask", (0xFFFFFFFF, 0x0000FFFF, 0x80000001, 0x12345678, 0x00000008), ids=hex)
def test_votes(seed, mask):
    x, y = numbers(32, low=-1, high=3), torch.full((7, 32), 77, dtype=torch.int32)
    kernels.votes(mask, x, y)
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    value = [int(x[lane]) for lane in lanes]
    bits = lambda keep: signed(sum(1 << lane for lane, v in zip(lanes, value, strict=True) if keep(v)))  # noqa: E731
    expected = torch.full((7, 32), 77, dtype=torch.int32)
    for lane in lanes:
        alike = bits(lambda v, own=int(x[lane]): v == own)
        votes = (bits(lambda v: v > 0), any(v > 1 for v in value), all(v > -1 for v in value), alike)
        expected[:, lane] = torch.tensor([*votes, sum(value), max(value), min(value)])
    assert torch.equal(y, expected)


def test_halves_of_a_warp_part_and_meet(seed):
    x, y = numbers(32), torch.empty(32, dtype=torch.int32)
    kernels.halves(x, y)
    expected = x.view(2, 16).sum(1, keepdim=True) * x.sum()
    assert torch.equal(y.view(2, 16), expected.expand(2, 16).int())


def test_atomics(seed):
    x = numbers(1000, low=0, high=7)
    counts, extremes = torch.zeros(7, dtype=torch.int32), torch.tensor([99, -99], dtype=torch.int32)
    total, came = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    kernels.atomics(x, counts, total, extremes, torch.empty_like(x), came)
    assert torch.equal(counts, x.bincount(minlength=7).int())
    assert (total.item(), extremes.tolist(), came.item()) == (x.sum(), [0, 6], 1000)


def test_a_lock_is_waited_for(seed):
    x, total, lock = numbers(96), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kernels.locked_sum(x, total, lock)
    assert total.item() == x.sum()


# Copies and matrices


@pytest.mark.parametrize("missing", range(5))
def test_copies_a_step_ahead(seed, missing):
    x, y = torch.randn(5, 64, 4), torch.empty(5, 64, 4)
    kernels.staged(x, y, missing, True, True)
    x[..., 4 - missing :] = 0
    assert torch.equal(y, x)


@pytest.mark.parametrize("wait, barrier", ((False, True), (True, False)))
def test_a_copy_used_too_early_or_overwritten_is_seen(wait, barrier):
    wrong = []
    for seed in range(1, 5):
        _sim.set_seed(seed)
        x, y = torch.randn(5, 64, 4), torch.empty(5, 64, 4)
        kernels.staged(x, y, 0, wait, barrier)
        wrong.append(not torch.equal(y, x))
    assert any(wrong)


def words(x):
    """Pairs of 16-bit numbers along the last axis, the first one low, as 32-bit words."""
    return x.contiguous().view(torch.int32)


def lanes(rows, columns):
    """For each register its rows and its columns, by the lane's g and t as PTX's figures have them. [registers, 32]"""
    lane = np.arange(32)
    return tuple(np.stack([f(lane // 4, lane % 4) for f in axis]) for axis in (rows, columns))


ROWS_D = (lambda g, t: g, lambda g, t: g, lambda g, t: g + 8, lambda g, t: g + 8)
D = lanes(ROWS_D, (lambda g, t: 2 * t, lambda g, t: 2 * t + 1) * 2)
ROWS_A = (lambda g, t: g, lambda g, t: g + 8) * 2
# Words of a row: pairs of the 16-bit types, single numbers of tf32; both have eight.
A = lanes(ROWS_A, (lambda g, t: t, lambda g, t: t, lambda g, t: t + 4, lambda g, t: t + 4))
B = lanes((lambda g, t: g,) * 2, (lambda g, t: t, lambda g, t: t + 4))  # of b's transpose


def multiplied(name, a, b, d):
    """d [16, 8] + a [16, K] b [8, K]^T by the instruction, each element taken to its place."""
    registers = torch.empty(32, 4)
    registers[:] = d[D].T
    arguments = (words(a)[A].T.contiguous(), words(b)[B].T.contiguous(), registers)
    getattr(kernels, f"multiply_{name}")(*arguments)
    result = torch.empty(16, 8)
    result[D] = registers.T
    return result


@pytest.mark.parametrize("name, dtype, K", (("bf16", bf16, 16), ("f16", torch.float16, 16), ("tf32", torch.float32, 8)))
def test_multiply(seed, name, dtype, K):
    a, b, d = (torch.randint(-8, 9, shape).float() for shape in ((16, K), (8, K), (16, 8)))
    assert torch.equal(multiplied(name, a.to(dtype), b.to(dtype), d), d + a @ b.T)  # whole numbers: exact
    a, b, d = torch.randn(16, K).to(dtype), torch.randn(8, K).to(dtype), torch.randn(16, 8)
    exact = d.double() + a.double() @ b.double().T
    bound = d.abs() + a.float().abs() @ b.float().abs().T
    tolerance = 2**-9 if name == "tf32" else 2**-20
    assert ((multiplied(name, a, b, d) - exact).abs() <= tolerance * bound).all()


def test_every_place_of_a_fragment():
    for m, n, k in np.ndindex(16, 8, 16):
        a, b = torch.zeros(16, 16, dtype=bf16), torch.zeros(8, 16, dtype=bf16)
        a[m, k], b[n, k] = 3, 5
        d = multiplied("bf16", a, b, torch.zeros(16, 8))
        assert d[m, n] == 15
        assert d.sum() == 15


def test_tf32_drops_thirteen_bits():
    a, b = torch.zeros(16, 8), torch.zeros(8, 8)
    a[2, 3], b[4, 3] = 1 + 2**-10 + 2**-11, 1
    assert multiplied("tf32", a, b, torch.zeros(16, 8))[2, 4] == 1 + 2**-10


@pytest.mark.parametrize("transposed", (False, True))
def test_rows_to_fragments(seed, transposed):
    x = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    d = torch.empty(32, 4, dtype=torch.int32)
    kernels.fragments(x.view(32, 8), d, transposed)
    for i in range(4):
        matrix = x[i].T if transposed else x[i]
        assert torch.equal(d[:, i].view(8, 4), words(matrix))


def test_matmul(seed):
    x, w = torch.randn(32, 80).to(bf16), torch.randn(24, 80).to(bf16)
    y = kernels.matmul(x, w)
    bound = x.double().abs() @ w.double().abs().T
    assert ((y - x.double() @ w.double().T).abs() <= 2**-20 * bound).all()


# Numbers


@pytest.mark.parametrize("dtype", (bf16, torch.float16))
def test_every_16_bit_number(dtype):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    wide, back = torch.empty(2**16), torch.empty(2**16, dtype=dtype)
    kernels.convert(x, wide)
    kernels.convert(wide, back)
    finite = ~x.isnan()
    assert torch.equal(wide.view(torch.int32)[finite], x.float().view(torch.int32)[finite])
    assert wide[~finite].isnan().all()
    assert torch.equal(back.view(torch.int16)[finite], x.view(torch.int16)[finite])
    assert (back.view(torch.int16)[~finite] == 0x7FFF).all()


@pytest.mark.parametrize("dtype", (bf16, torch.float16))
def test_rounding(dtype):
    """All numbers of the type, all that are midway, and the nearest floats of both; and floats of every kind."""
    exact = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()]
    exact = exact.sort().values
    middle = ((exact[1:].double() + exact[:-1].double()) / 2).float()
    near = torch.cat([exact, middle, torch.tensor([65519.996, 65520.0, 3.3961776e38, 3.4028235e38, float("inf")])])
    up, down = near.nextafter(torch.tensor(float("inf"))), near.nextafter(torch.tensor(-float("inf")))
    any_bits = torch.randint(-(2**31), 2**31, (2**18,), dtype=torch.int64).int().view(torch.float32)
    x = torch.cat([near, up, down, -near, any_bits[~any_bits.isnan()]])
    y = torch.empty(len(x), dtype=dtype)
    kernels.convert(x, y)
    assert torch.equal(y.view(torch.int16), x.to(dtype).view(torch.int16))


# Errors


def test_unwritten_shared_memory_is_nan():
    y = torch.zeros(64)
    kernels.reverse(torch.randn(64), torch.empty(64), 64)
    kernels.unwritten(y)
    assert (y.view(torch.int32) == -1).all()


@pytest.mark.parametrize("at", (256, 256 + 1000, -1, -1000))
def test_writes_beside_shared_memory(at, seed):
    kernels.write_shared(256, 0)
    kernels.write_shared(256, 255)
    place = "before its" if at < 0 else f"at byte {at} of its 256 bytes of"
    with pytest.raises(RuntimeError, match=rf"block \(1, 0, 0\) wrote {place} shared memory"):
        kernels.write_shared(256, at)


FAULTS = {
    "circle": r"^block .0, 0, 0.: deadlock, no thread can go on\n.* mask 0x00000003: thread 0, 32\n.*: thread 1, 33\n",
    "wrong_mask": r"thread 16 of block .0, 0, 0.: at __shfl_sync .*, mask 0x0000ffff, a mask without its own lane 16",
    "lane_outside": "__shfl_sync .* reads lane 16, which is not in the mask",
    "two_collectives": "thread 16 .* at __any_sync.*\n.* at __shfl_xor_sync .*, mask 0xffffffff: thread 0 to 15\n",
    "two_masks": "thread 31 .* at __syncwarp .*, mask 0xfffffffe,.*\n.* mask 0xffffffff: thread 0 to 30\n",
    "collective_and_barrier": r"thread 16 .* at __syncthreads .*\n.* at __syncwarp .*: thread 0 to 15",
    "two_barriers": r"thread 32 .* at __syncthreads \(self_test.cuh:\d+\), .* another barrier\n.*: thread 0 to 31\n",
    "after_return": "thread 3 of .* returns, but lanes of its warp wait for it\n.*: thread 0 to 2\n",
    "return_from_a_collective": "thread 3 of .* returns, but lanes of its warp wait for it\n.*: thread 0 to 2\n",
    "unaligned_copy": "cp.async from an address that is not a multiple of 16",
    "copy_outside": "thread 16 .*: cp.async at byte 256 of 256 bytes of shared memory",
    "unaligned_rows": "thread 1 .*: ldmatrix at an address that is not a multiple of 16",
    "bad_width": "shuffle of width 12",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault, seed):
    with pytest.raises(RuntimeError) as caught:
        kernels.faulty(fault, torch.empty(64))
    if seed == 0:
        assert re.search(FAULTS[fault], str(caught.value)), str(caught.value)
    assert re.match(r"(thread \d+ of )?block \([01], 0, 0\): ", str(caught.value))
    test_barrier(seed)  # nothing is left of the launch that failed


LIMITS = {
    "grid": ((0, 1, 1), (1, 65536, 1), (1, 1, 65536), (2**31, 1, 1)),
    "block": ((0, 1, 1), (1025, 1, 1), (32, 33, 1), (1, 1, 65)),
    "shared": (227 * 1024 + 1,),
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in LIMITS.items() for value in values])
def test_launches_a_gpu_refuses(name, value):
    fine = {"grid": (2, 1, 1), "block": (32, 2, 1), "shared": 227 * 1024}
    kernels.launch(**fine)
    with pytest.raises(RuntimeError, match="cannot launch"):
        kernels.launch(**{**fine, name: value})


def test_tensors_of_another_kind():
    with pytest.raises(TypeError, match="expected a tensor of float32, got float16"):
        kernels.reverse(torch.empty(64).half(), torch.empty(64), 64)
    with pytest.raises(TypeError, match="complex64"):
        kernels.reverse(torch.empty(64, dtype=torch.complex64), torch.empty(64), 64)
    with pytest.raises(TypeError, match="expected a CPU tensor"):
        kernels.reverse(torch.empty(64, device="meta"), torch.empty(64), 64)
