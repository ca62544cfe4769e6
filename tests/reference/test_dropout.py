"""Dropout from a seed: the generator's published numbers, an independent scalar one, and the statistics of the mask."""

import itertools
import random

import pytest
import torch

from lora_kernels.reference.dropout import dropout_mask, keep_scale, philox, threshold

WORD = 0xFFFFFFFF


def scalar_philox(counter, key, rounds):
    """Philox-4x32 of Salmon et al., §3.2, on Python's integers: counter and key as tuples of words."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & WORD, first >> 32 ^ c[3] ^ k[1], first & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


# Random123's kat_vectors, philox4x32: rounds, counter, key, what comes out.
KNOWN = (
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        10, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)  # fmt: skip


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN)
def test_the_scalar_generator_gives_the_published_numbers(rounds, counter, key, expected):
    assert tuple(scalar_philox(counter, key, rounds)) == expected


def signed(value):
    return value - 2**64 if value >= 2**63 else value


def test_philox():
    draw = random.Random(0)
    counters = [0, 1, WORD, WORD + 1, 2**63 - 1, 2**64 - 1, *(draw.getrandbits(64) for _ in range(50))]
    for key in (0, 1, 2**63, 2**64 - 1, draw.getrandbits(64)):
        words = philox(torch.tensor([signed(c) for c in counters]), torch.tensor(signed(key)))
        got = torch.stack(words, 1).tolist()
        for counter, row in zip(counters, got, strict=True):
            want = scalar_philox((counter & WORD, counter >> 32, 0, 0), (key & WORD, key >> 32), 7)
            assert row == want, (counter, key)


@pytest.mark.parametrize("seed", (0, 1, -1, 2**62 + 9, -(2**63)))
@pytest.mark.parametrize(("rows", "columns"), ((1, 1), (3, 8), (5, 13), (2, 64)))
def test_an_element_takes_its_half_word(seed, rows, columns):
    key = seed % 2**64
    mask = dropout_mask(torch.tensor([seed]), rows, columns, 0.3)
    limit = round(0.3 * 65536)
    for m in range(rows):
        for k in range(columns):
            counter = m * -(-columns // 8) + k // 8
            word = scalar_philox((counter & WORD, counter >> 32, 0, 0), (key & WORD, key >> 32), 7)[k % 8 // 2]
            half = word >> 16 if k % 2 else word & 0xFFFF
            assert bool(mask[m, k]) == (half >= limit)


@pytest.mark.parametrize("p", (0.05, 0.1, 0.5, 0.9))
@pytest.mark.parametrize("seed", (0, 7, -(2**40)))
def test_rate(p, seed):
    """Within five standard deviations, as a whole and in each row and column."""
    rows, columns = 500, 600
    dropped = (~dropout_mask(torch.tensor([seed]), rows, columns, p)).double()
    for values, count in ((dropped.mean(), rows * columns), (dropped.mean(0), rows), (dropped.mean(1), columns)):
        assert ((values - p).abs() < 5 * (p * (1 - p) / count) ** 0.5).all()


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1])


@pytest.mark.parametrize("p", (0.1, 0.5))
def test_neighbours_are_independent(p):
    """Elements one, two, eight and sixteen apart, neighbouring rows, seeds a step or one high bit apart."""
    mask = dropout_mask(torch.tensor([5]), 512, 512, p)
    limit = 5 / mask.numel() ** 0.5
    for apart in (1, 2, 3, 4, 7, 8, 16, 64):
        assert abs(correlation(mask[:, apart:], mask[:, :-apart])) < limit, apart
        assert abs(correlation(mask[apart:], mask[:-apart])) < limit, apart
    for seed in (4, 6, -5, 5 + 2**32, 5 + 2**62):
        assert abs(correlation(mask, dropout_mask(torch.tensor([seed]), 512, 512, p))) < limit, seed


def test_the_mask_of_a_row_does_not_depend_on_how_many_there_are():
    seed = torch.tensor([99])
    whole = dropout_mask(seed, 40, 77, 0.4)
    for rows in (0, 1, 7, 39):
        assert torch.equal(dropout_mask(seed, rows, 77, 0.4), whole[:rows])


def test_columns_of_one_block_more_change_no_block():
    """77 columns and 80 take the same blocks."""
    seed = torch.tensor([99])
    assert torch.equal(dropout_mask(seed, 9, 80, 0.4)[:, :77], dropout_mask(seed, 9, 77, 0.4))


def test_less_is_dropped_where_p_is_less():
    """One seed's masks are nested: what 0.1 drops, 0.5 drops."""
    masks = [dropout_mask(torch.tensor([3]), 64, 64, p) for p in (0.0, 0.1, 0.5, 0.99, 1.0)]
    assert masks[0].all()
    assert not masks[-1].any()
    for more, less in itertools.pairwise(masks):
        assert not (less & ~more).any()
        assert (more & ~less).any()


@pytest.mark.parametrize(
    ("p", "t"), ((0.0, 0), (2**-18, 0), (2**-16, 1), (0.05, 3277), (0.5, 32768), (1 - 2**-16, 65535), (1.0, 65536))
)
def test_p_is_a_multiple_of_two_to_the_minus_16(p, t):
    """What is kept is scaled so that its mean stays."""
    assert threshold(p) == t
    assert abs(t / 65536 - p) <= 2**-17
    assert keep_scale(p) == (0.0 if t == 65536 else 1 / (1 - t / 65536))


def test_the_seed_may_have_any_shape_of_one_element():
    want = dropout_mask(torch.tensor([3]), 4, 9, 0.5)
    for seed in (torch.tensor(3), torch.tensor([[3]])):
        assert torch.equal(dropout_mask(seed, 4, 9, 0.5), want)
