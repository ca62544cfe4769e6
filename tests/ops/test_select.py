"""The choice of a backend, without the devices."""

import dataclasses
import itertools

import pytest
import torch
from lora_kernels.kernels.configs import settings

from lora_kernels.select import (
    BACKENDS,
    Gpu,
    choose,
    cuda_is_faster,
    dequantize_tiles,
    expand_grad_tiles,
    expand_tiles,
    gradient_rows,
    in_grad_tiles,
    makes_v_again,
    outer_tiles,
    quantized_grad_tiles,
    quantized_tiles,
    runs_on,
    shrink_tiles,
)

EVERY = frozenset(BACKENDS)


@pytest.mark.parametrize(
    "device, available, forced, want",
    (
        ("cpu", EVERY, None, "cpu"),
        ("cpu", {"reference"}, None, "reference"),
        ("cpu", {"reference", "sim"}, None, "reference"),
        ("cpu", {"reference", "triton", "cuda"}, None, "reference"),
        ("cuda", EVERY, None, "triton"),
        ("cuda", {"reference", "cuda"}, None, "cuda"),
        ("cuda", {"reference", "triton"}, None, "triton"),
        ("cuda", {"reference", "cpu"}, None, "reference"),
        ("mps", EVERY, None, "reference"),
        ("cpu", EVERY, "reference", "reference"),
        ("cpu", EVERY, "sim", "sim"),
        ("cuda", EVERY, "triton", "triton"),
        ("mps", EVERY, "reference", "reference"),
        ("cpu", EVERY, "triton", None),
        ("cuda", EVERY, "cpu", None),
        ("cuda", EVERY, "sim", None),
        ("cpu", {"reference"}, "cpu", None),
        ("cuda", {"reference", "cuda"}, "triton", None),
        ("cpu", EVERY, "gpu", None),
    ),
)
def test_choice(device, available, forced, want):
    choice = choose(device, frozenset(available), forced)
    assert choice.backend == want
    assert choice.reason
    if want is None:
        assert repr(forced) in choice.reason


def test_cuda_comes_first_where_it_is_faster():
    assert choose("cuda", EVERY, cuda_first=True).backend == "cuda"
    assert choose("cuda", frozenset({"triton"}), cuda_first=True).backend == "triton"
    assert choose("cpu", EVERY, cuda_first=True).backend == "cpu"
    faster = Gpu((9, 0), cuda=True)
    assert [cuda_is_faster(d, faster) for d in (torch.bfloat16, torch.float16, torch.float32)] == [True, False, False]
    assert not cuda_is_faster(torch.bfloat16, Gpu((9, 0)))


@pytest.mark.parametrize(
    "capability, architectures, runs",
    (
        ((9, 0), ("sm_90",), True),
        ((8, 6), ("sm_80", "sm_90"), True),
        ((8, 0), ("sm_86",), False),
        ((8, 0), ("sm_90",), False),
        ((7, 5), ("sm_80", "compute_100"), False),
        ((12, 0), ("sm_80", "compute_100"), True),
        ((12, 0), ("sm_100a",), False),
        ((10, 0), ("sm_100a",), True),
        ((9, 0), (), False),
    ),
)
def test_what_a_gpu_runs(capability, architectures, runs):
    assert runs_on(capability, architectures) == runs


def test_reasons_tell_the_cases_apart():
    assert "does not run on cpu" in choose("cpu", EVERY, "cuda").reason
    assert "has no kernel" in choose("cpu", frozenset({"reference"}), "cpu").reason
    assert "there are reference, cpu" in choose("cpu", EVERY, "gpu").reason
    assert "no cpu kernel here" in choose("cpu", frozenset({"reference"})).reason
    assert "mps" in choose("mps", EVERY).reason


def test_a_choice_is_a_value():
    choice = choose("cpu", EVERY)
    assert choice == choose("cpu", EVERY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.backend = "cuda"


def test_interpreted_triton_takes_cpu_tensors_when_forced():
    assert choose("cpu", EVERY, "triton", interpreted=True).backend == "triton"
    assert choose("cpu", EVERY, interpreted=True).backend == "cpu"
    assert choose("cpu", EVERY, "triton").backend is None


GPUS = (Gpu(), Gpu((8, 6), 99 * 1024), Gpu((9, 0), 227 * 1024), Gpu((10, 0), 227 * 1024))
SIZES = (1, 16, 256, 257, 1000, 5000, 100_000)
RANKS = (1, 16, 17, 64, 100, 512)
DTYPES = tuple(itertools.product((torch.float32, torch.bfloat16), repeat=2))


SLICES = (1, 2, 3)


def powers_of_two(*numbers):
    return all(n >= 16 and n & (n - 1) == 0 for n in numbers)


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("K", (1, 63, 512, 4096, 4097, 14336, 100_000))
def test_the_chunks_of_a_sum_do_not_depend_on_the_batch(K, R):
    for x, factors in DTYPES:
        tiles = [
            (shrink_tiles(pairs, L, K, R, S, x, factors, gpu), S)
            for gpu, pairs, L, S in itertools.product(GPUS, SIZES, (1, 64), SLICES)
        ]
        assert len({(t.chunk, t.chunks, t.block_k) for t, _ in tiles}) == 1
        for t, S in tiles:
            assert powers_of_two(t.block_m, t.block_k, t.block_r)
            assert t.chunk % t.block_k == 0
            assert (t.chunks - 1) * t.chunk < K <= t.chunks * t.chunk
            assert t.split in (1, t.chunks)
            assert t.slices == 1 or (S <= t.slices < 2 * S and powers_of_two(16 * t.slices) and t.block_r >= R)


def test_x_is_read_once_for_all_slices_where_it_is_long():
    gpu = Gpu((9, 0), 227 * 1024)
    assert shrink_tiles(8192, 8, 4096, 16, 3, torch.bfloat16, torch.bfloat16, gpu).slices == 4
    assert shrink_tiles(8192, 8, 4096, 64, 2, torch.bfloat16, torch.bfloat16, gpu).slices == 2
    assert shrink_tiles(8, 8, 4096, 16, 3, torch.bfloat16, torch.bfloat16, gpu).slices == 1


def test_tiles_fit_in_shared_memory():
    for pairs, R, S, (x, factors), gpu in itertools.product(SIZES, RANKS, SLICES, DTYPES, GPUS):
        t = shrink_tiles(pairs, 1, 4096, R, S, x, factors, gpu)
        size = (t.block_m + t.slices * t.block_r) * t.block_k * max(x.itemsize, factors.itemsize)
        assert t.num_stages == 1 or t.num_stages * size <= gpu.shared


def test_ranks_are_summed_alike_in_every_batch():
    for R, factors in itertools.product(RANKS, (torch.float32, torch.float16)):
        tiles = [
            expand_tiles(pairs, L, N, R, 1, factors, GPUS[2]) for pairs in SIZES for L in (1, 64) for N in (64, 28672)
        ]
        assert len({t.block_r for t in tiles}) == 1
        assert all(powers_of_two(t.block_m, t.block_n, t.block_r) for t in tiles)


def test_the_tiles_of_gradients():
    for R, (dy, factors) in itertools.product(RANKS, DTYPES):
        outer, expand = outer_tiles(R), expand_grad_tiles(R, dy, factors, GPUS[2])
        assert powers_of_two(outer.block_p, outer.block_u, outer.block_w, expand.block_p, expand.block_n)
        assert outer.size % outer.block_p == expand.size % expand.block_p == 0
        assert expand.block_r >= R or not expand.fused
    assert expand_grad_tiles(16, torch.bfloat16, torch.bfloat16, Gpu()).fused


def test_the_tiles_of_gradients_that_enter_x():
    for rows, K, R, (x, factors), gpu in itertools.product(SIZES, (63, 4096), RANKS, DTYPES, GPUS):
        t = in_grad_tiles(rows, K, R, x, factors, gpu)
        assert powers_of_two(t.block_m, t.block_k, t.block_r)
        assert t.block_k % 8 == 0, "a block of the mask"
        assert t.size % t.block_m == 0
        assert t.block_r >= min(R, 32)
    assert in_grad_tiles(8192, 4096, 16, torch.bfloat16, torch.bfloat16, GPUS[2]).size == 512


def test_few_rows_are_shared_by_more_programs():
    sizes = [gradient_rows(rows, 16, 512, GPUS[2]) for rows in (100, 1000, 2000, 8192)]
    assert sizes == [64, 128, 256, 512]
    assert gradient_rows(100, 1000, 512, GPUS[2]) == 512


GROUPS = (1, 7, 16, 32, 48, 64, 96, 128, 4096)
LENGTHS = (1, 63, 4096, 11008, 14336)


@pytest.mark.parametrize("group", GROUPS)
def test_a_packed_block_has_one_scale_where_it_says_so(group):
    for K, rows, (x, factors), gpu in itertools.product(LENGTHS, SIZES, DTYPES, GPUS):
        tiles = [of(rows, 4096, K, group, x, factors, gpu) for of in (quantized_tiles, quantized_grad_tiles)]
        for t in (*tiles, dequantize_tiles(K, group)):
            assert powers_of_two(t.block_m, t.block_k)
            assert not t.one_group or len({k // group for k in range(min(t.block_k, K))}) == 1
            assert not t.one_group or group % t.block_k == 0 or group >= K
        assert tiles[0].one_group == (group % 32 == 0 or group >= K)


def test_programs_that_share_a_packed_sum_have_all_of_it():
    for N, K, rows, (x, factors), gpu in itertools.product(LENGTHS, LENGTHS, SIZES, DTYPES, GPUS):
        y, dx = (of(rows, N, K, 64, x, factors, gpu) for of in (quantized_tiles, quantized_grad_tiles))
        for t, length, block in ((y, K, y.block_k), (dx, N, dx.block_n)):
            assert powers_of_two(t.block_m, t.block_n, t.block_k, t.block_r)
            assert (t.split - 1) * t.steps * block < length <= t.split * t.steps * block
            assert t.split == 1 or t.steps >= 4
            assert t.split == 1 or t.split * rows * 8 <= length


def test_a_packed_sum_is_shared_where_rows_are_few():
    bf16, gpu = torch.bfloat16, GPUS[2]
    splits = [quantized_tiles(rows, 4096, 4096, 64, bf16, bf16, gpu).split for rows in (1, 16, 64, 512, 8192)]
    assert splits == [8, 8, 8, 1, 1]
    assert quantized_tiles(1, 28672, 4096, 64, bf16, bf16, gpu).split == 1
    assert quantized_grad_tiles(64, 4096, 4096, 64, bf16, bf16, gpu).split == 8


def test_packed_tiles_fit_in_shared_memory():
    for rows, group, (x, factors), gpu in itertools.product(SIZES, GROUPS, DTYPES, GPUS):
        for of in (quantized_tiles, quantized_grad_tiles):
            t = of(rows, 4096, 4096, group, x, factors, gpu)
            other = t.block_k if of is quantized_tiles else t.block_n
            unpacked = t.block_n * t.block_k * x.itemsize
            staged = t.block_m * other * x.itemsize + t.block_n * t.block_k
            assert unpacked + t.num_stages * staged <= gpu.shared


def test_only_an_expand_with_one_block_of_ranks_adds_parts_for_many_columns():
    for pairs, R, (x, factors), gpu in itertools.product((1, 300, 500), (16, 64, 100), DTYPES, GPUS):
        split = shrink_tiles(pairs, 1, 14336, R, 1, x, factors, gpu).split
        expand = expand_tiles(pairs, 1, 4096, R, 1, factors, gpu)
        assert split == 1 or expand.group == 1 or expand.block_r >= R


def test_one_kernel_is_opt_in():
    bf16, tuned = torch.bfloat16, dataclasses.replace(GPUS[2], recompute=32768)
    assert not makes_v_again(8, 8, 1024, 16, bf16, bf16, GPUS[2])
    assert makes_v_again(8, 8, 1024, 16, bf16, bf16, tuned)
    assert not makes_v_again(8, 8, 1025, 16, bf16, bf16, tuned)
    assert not makes_v_again(300, 1, 1024, 16, bf16, bf16, tuned)
    assert not makes_v_again(8, 8, 64, 128, bf16, bf16, tuned)
    assert not makes_v_again(8, 8, 64, 16, bf16, torch.float32, tuned)


def test_a_tuned_device_has_its_settings(tmp_path):
    (tmp_path / "some-gpu.json").write_text('{"programs": 1024, "recompute": 16384}')
    found = settings("Some GPU", tmp_path)
    assert Gpu((9, 0), **found) == Gpu((9, 0), programs=1024, recompute=16384)
    assert settings("Some GPU 2", tmp_path) == {}


def test_more_programs_take_shorter_turns():
    groups = [
        expand_tiles(pairs, 1, 4096, 16, 1, torch.bfloat16, dataclasses.replace(GPUS[2], programs=programs)).group
        for pairs, programs in ((512, 512), (8192, 512), (8192, 4096))
    ]
    assert groups == [2, 8, 4]
