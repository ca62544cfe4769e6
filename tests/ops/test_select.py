"""The choice of a backend, without the devices."""

import dataclasses
import itertools
import math

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
    haar_tiles,
    hadamard_stages,
    hadamard_tiles,
    in_grad_tiles,
    makes_v_again,
    outer_tiles,
    quantized_grad_tiles,
    quantized_tiles,
    runs_on,
    shrink_tiles,
    spectral_dot_tiles,
    spectral_route,
    spectral_tiles,
    trigonometric_tiles,
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


SHAPES = ((1, 1), (64, 40), (4096, 4096), (14336, 4096))
KINDS = ("fourier", "dct", "hartley", "identity", "wht", "haar")


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("kind", KINDS)
def test_few_coefficients_go_by_the_rows_of_x(kind, device):
    """FourierFT's, LoCA's and WaveFT's, at any number of rows; and any of them at few rows."""
    for N, K in SHAPES[2:]:
        assert {spectral_route(rows, 10_000, (N, K), kind, device) for rows in SIZES} == {"activation"}
        assert spectral_route(4, N * K, (N, K), kind, device) == "activation"


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_built_where_it_is_dense_and_rows_are_many(kind, device):
    for N, K in SHAPES:
        assert spectral_route(100_000, N * K, (N, K), kind, device) == "weight"
        routes = [spectral_route(rows, N * K, (N, K), kind, device) for rows in (0, 1, *SIZES)]
        assert routes == sorted(routes), "once the weight is the faster way, more rows do not change that"
        routes = [spectral_route(8192, N * K // part, (N, K), kind, device) for part in (10_000, 1000, 100, 10, 1)]
        assert routes == sorted(routes), "nor do more coefficients"


def test_a_gpu_multiplies_densely_at_fewer_coefficients():
    """QWHA's 3 %."""
    n = 64 * (4096 + 4096)
    assert spectral_route(8192, n, (4096, 4096), "wht", "cuda") == "weight"
    assert spectral_route(16, n, (4096, 4096), "wht", "cuda") == "activation"
    assert spectral_route(8192, n, (4096, 4096), "wht", "cpu") == "activation"


def test_nothing_goes_by_the_rows_of_x():
    for rows, n, shape in ((0, 5, (8, 8)), (7, 0, (8, 8)), (7, 0, (0, 8)), (7, 0, (8, 0)), (0, 0, (0, 0))):
        assert spectral_route(rows, n, shape, "dct", "cpu") == "activation"


def are_powers_of_two(*numbers):
    return all(n > 0 and n & (n - 1) == 0 for n in numbers)


ROWS = (1, 2, 8, 12, 48, 96, 137, 352, 896, 1000, 1344, 4096, 5120, 8191, 11008, 13696, 14336, 29568, 1 << 17, 1 << 22)


def test_the_stages_of_a_hadamard_matrix_are_all_of_its_factors():
    for orders, power in (((), 1), ((), 4096), ((), 1 << 22), ((28,), 512), ((172,), 64), ((12, 28, 44), 2),
                          ((2, 20), 128), ((428,), 32), ((1948,), 8), ((12, 12, 12), 1)):  # fmt: skip
        stages = hadamard_stages(orders, power)
        assert sum((stage.orders for stage in stages), ()) == orders
        assert math.prod(stage.power * stage.right for stage in stages) == power
        assert all(stage.right == 1 for stage in stages[:-1])
        assert all(are_powers_of_two(stage.power, stage.right) for stage in stages)
        for stage in stages:
            assert math.prod(stage.orders) * stage.power <= max((512, *orders))


def test_a_hadamard_matrix_of_a_model_is_one_stage():
    for orders, power in (((), 4096), ((12,), 256), ((2, 20), 128), ((28,), 512), ((172,), 64), ((28,), 1024)):
        assert len(hadamard_stages(orders, power)) == 1


def test_hadamard_tiles_are_whole_blocks_that_fit():
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for L, (Q, right), x, gpu in itertools.product(
        (1, 12, 64, 112, 172, 428), ((1, 1), (88, 1), (64, 64)), dtypes, GPUS
    ):
        t = hadamard_tiles(L, Q, right, x, x, gpu)
        assert are_powers_of_two(t.block_i, t.block_j, t.block_m, t.block_q)
        assert min(t.block_i, t.block_j, t.block_m * t.block_q) >= 16  # what tl.dot takes
        assert right == 1 or t.block_q == right
        assert t.num_stages * t.block_j * (2 * t.block_i + x.itemsize * 128) + 2 * right * right <= gpu.shared


def test_trigonometric_tiles_take_few_multiply_adds():
    for N, x, transpose, gpu in itertools.product(ROWS, (torch.float32, torch.bfloat16), (False, True), GPUS):
        t = trigonometric_tiles(N, x, transpose, gpu)
        assert N % t.N2 == 0
        assert are_powers_of_two(t.block_m, t.block_i, t.block_j, t.block_q)
        assert t.block_q >= t.N2
        assert t.block_q == 1 if t.N2 == 1 else t.block_q >= 16
        assert min(t.block_i, t.block_j, t.block_m * t.block_q) >= 16
        assert t.gather == (N // t.N2 > 1024)
        if N % 64 == 0 and N > 1000:
            assert t.N2 in (16, 32, 64)


def test_haar_tiles_have_every_level_once():
    for N, levels in ((1, 1), (2, 1), (1000, 10), (4096, 1), (4096, 12), (1 << 20, 20), (8191, 13), (3, 30)):
        tiles = haar_tiles(N, levels)
        assert [t.level for t in tiles] == list(itertools.accumulate((t.levels for t in tiles[:-1]), initial=0))
        assert sum(t.levels for t in tiles) == levels
        for t in tiles:
            assert are_powers_of_two(t.block_m, t.block)
            assert t.block >= 1 << t.levels
    assert len(haar_tiles(14336, 11)) == 1


ENTRIES = (1, 40, 1000, 16384, 524288)


def test_the_tiles_of_a_spectrum_are_of_one_layout():
    for rows, entries, features, gpu in itertools.product((*SIZES, 2, 512), ENTRIES, (1, 896, 14336), GPUS):
        dot = spectral_dot_tiles(rows, entries, features, gpu)
        for length in (1, 896, 14336):
            t = spectral_tiles(rows, length, entries, features)
            assert (t.block_m, t.blocked) == (dot.block_m, dot.blocked)
            assert rows > 1 or (t.block_m, t.blocked) == (1, False)
            assert not any(n & (n - 1) for n in (t.block_m, t.block_r, t.block_e, dot.block_e))
            assert 128 <= t.block_m * t.block_r * t.block_e <= 4096, "a number a thread, and no more than registers"
        assert dot.block_m * dot.block_e <= 2048
        blocks = -(-rows // dot.block_m)
        assert (dot.chunks - 1) * dot.steps < blocks <= dot.chunks * dot.steps
        assert dot.chunks == 1 or dot.steps >= 4


def test_numbers_stand_side_by_side_where_entries_are_many():
    def blocked(rows, entries):
        return spectral_tiles(rows, 4096, entries, 4096).blocked

    assert [blocked(8192, n) for n in (100, 1000, 2048, 4096, 524288)] == [False, False, False, True, True]
    assert [blocked(rows, 524288) for rows in (1, 2, 16)] == [False, True, True]
    assert [blocked(rows, 10000) for rows in (1, 16, 64, 512)] == [False, False, False, True]


def test_the_entries_of_a_row_are_shared_where_they_are_many():
    sizes = [(spectral_tiles(rows, 4096, 524288, 4096)) for rows in (1, 16, 8192)]
    assert [(t.block_m, t.block_r, t.block_e) for t in sizes] == [(1, 8, 32), (16, 8, 16), (32, 16, 8)]
    assert all(spectral_tiles(rows, 4096, 1000, 4096).block_e == 1 for rows in (1, 16, 8192))


def test_a_gradient_of_few_entries_is_summed_in_parts():
    chunks = [spectral_dot_tiles(8192, n, 4096, GPUS[2]).chunks for n in (1000, 10000, 524288)]
    assert chunks == [128, 13, 1]
    assert spectral_dot_tiles(64, 1000, 4096, GPUS[2]).chunks == 1


@pytest.mark.parametrize("n, rows, route", ((1000, 1 << 20, "activation"), (65536, 1 << 20, "activation"),
    (524288, 16, "activation"), (524288, 8192, "weight")))  # fmt: skip
def test_few_coefficients_or_rows_go_without_the_weight_on_a_gpu(n, rows, route):
    assert spectral_route(rows, n, (4096, 4096), "wht", "cuda") == route
