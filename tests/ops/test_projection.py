"""Projections onto cosine vectors, against dense matrices in float64."""

import math

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops import projection
from lora_kernels.testing import assert_within_rule

SHAPES = ((40, 24), (24, 40), (33, 33), (1, 7), (5, 1))


def cosines(n):
    k, j = torch.arange(n)[:, None], torch.arange(n)
    C = torch.cos(math.pi * (k * (2 * j + 1) % (4 * n)).double() / (2 * n)) * (2 / n) ** 0.5
    C[0] *= 0.5**0.5
    return C


def expected(G, rank, right, ell):
    """(g, indices, what is kept) in float64."""
    C = cosines(G.shape[1] if right else G.shape[0])
    S = G.double() @ C.T if right else C @ G.double()
    indices = S.norm(ell, dim=0 if right else 1).topk(rank).indices.sort().values
    g = S[:, indices] if right else S[indices]
    return g, indices, g @ C[indices] if right else C[indices].T @ g


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("ell", (1, 2))
@pytest.mark.parametrize("side", ("auto", "right", "left"))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_coefficients_are_kept(shape, side, ell, backend, monkeypatch):
    monkeypatch.setattr(projection, "PANEL", 16)  # several panels
    G = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    right = side == "right" or (side == "auto" and shape[0] >= shape[1])
    length = shape[1] if right else shape[0]
    for rank in {1, (length + 1) // 2, length}:
        g, indices, kept = expected(G, rank, right, ell)
        noise = 4 * length**0.5 * 2**-24 * float(g.norm() / g.numel() ** 0.5)
        with lk.backend(backend):
            own, found = lk.dct_topk_project(G, rank, side=side, ell=ell)
            back = lk.dct_backproject(own, found, length, side="right" if right else "left")
        assert torch.equal(found, indices)
        assert_within_rule(own, g, g.float(), noise=noise)
        assert_within_rule(back, kept, kept.float(), noise=noise)


def test_all_coefficients_are_all_of_it_and_more_are_no_worse():
    G = torch.randn(48, 32)
    errors = [(lk.dct_backproject(*lk.dct_topk_project(G, r), 32, side="right") - G).norm() for r in (1, 8, 20, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5 * G.norm()


def test_half_precision_and_strides():
    G = torch.randn(64, 96).to(torch.bfloat16)[:, ::2]
    g, indices = lk.dct_topk_project(G, 7)
    assert g.dtype == torch.bfloat16
    assert g.shape == (64, 7)
    torch.testing.assert_close(g.double(), (G.double() @ cosines(48).T)[:, indices], rtol=2**-7, atol=2**-7)
    assert lk.dct_backproject(g, indices, 48, side="right").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changed, error, words",
    (
        ({"G": [1.0]}, TypeError, "G must be a tensor"),
        ({"G": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "G must be"),
        ({"G": torch.zeros(3)}, ValueError, r"G must be \[R, C\]"),
        ({"G": torch.zeros(0, 4)}, ValueError, "not empty"),
        ({"rank": 0}, ValueError, "rank must be"),
        ({"rank": 5}, ValueError, "rank must be"),
        ({"rank": 2.0}, ValueError, "rank must be"),
        ({"side": "top"}, ValueError, "side must be"),
        ({"ell": 3}, ValueError, "ell must be"),
    ),
)
def test_bad_input(changed, error, words):
    with pytest.raises(error, match=words):
        lk.dct_topk_project(**{"G": torch.zeros(6, 4), "rank": 2, **changed})


@pytest.mark.parametrize(
    "changed, error, words",
    (
        ({"indices": torch.zeros(3, dtype=torch.int64)}, ValueError, "do not fit"),
        ({"indices": torch.zeros(2, dtype=torch.int32)}, TypeError, "indices must be int64"),
        ({"indices": torch.tensor([0, 9])}, IndexError, r"0\.\.3"),
        ({"length": 1}, ValueError, "rank must be"),
        ({"side": "auto"}, ValueError, "side must be"),
    ),
)
def test_bad_input_on_the_way_back(changed, error, words):
    given = {"g": torch.zeros(6, 2), "indices": torch.tensor([0, 3]), "length": 4, "side": "right"}
    with pytest.raises(error, match=words):
        lk.dct_backproject(**{**given, **changed})
