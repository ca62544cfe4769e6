"""Orthogonal adapters on the rows of x: reflections and block rotations against dense matrices in float64."""

import pytest
import torch

import lora_kernels as lk
from lora_kernels.ops.structured import cayley
from lora_kernels.testing import assert_within_rule

BACKENDS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def product_of_reflections(U):
    P = torch.eye(U.shape[0], dtype=U.dtype)
    for u in (U / U.norm(dim=0)).T:
        P = P - 2 * (P @ u)[:, None] * u
    return P


def householder_dense(x, W, U, bias):
    y = x @ (W @ product_of_reflections(U)).T
    return y if bias is None else y + bias


def rotate_dense(x, R):
    D = x.shape[-1] // R.shape[-1]
    return x @ torch.block_diag(*R.expand(D, *R.shape[1:]))


def results(function, leaves, dy):
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def compare(function, dense, leaves, dy, names):
    """Each result and gradient against float64, by the rule; plain PyTorch is the dense way in the leaves' dtype."""
    result = results(function, leaves, dy)
    oracle = results(dense, [t.double() for t in leaves], dy)
    dtype = leaves[0].dtype
    plain = results(lambda *a: dense(*(t.float() for t in a)).to(dtype), leaves, dy)
    for name, r, o, p in zip(names, result, oracle, plain, strict=True):
        if r.dtype != torch.float32:  # the base's product is rounded, and so is its sum with the adapter's part
            p = (p.float() + (r.float() - p.float()).sign() * 0).to(r.dtype)
        noise = 8 * r.shape[-1] ** 0.5 * 2**-24 * float(o.detach().abs().max())
        if r.dtype == torch.float32:
            assert_within_rule(r.detach(), o.detach(), p.detach(), noise=noise, what=name)
        else:
            limit = 2 * (p.double() - o).norm() + 1e-6 * o.norm()
            assert (r.double() - o).norm() <= limit, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, K, N, r", ((1, 5, 3, 1), (7, 24, 40, 8), (33, 64, 48, 5), (3, 16, 16, 16)))
def test_reflections(M, K, N, r, dtype, backend):
    generator = torch.Generator().manual_seed(M)
    x, W, U, dy, bias = (torch.randn(*size, generator=generator) for size in ((M, K), (N, K), (K, r), (M, N), (N,)))
    x, W, bias = x.to(dtype), W.to(dtype), bias.to(dtype)
    with lk.backend(backend):
        compare(
            lambda x, U: lk.householder_linear(x, W, U, bias=bias),
            lambda x, U: householder_dense(x, W.to(x.dtype), U, bias.to(x.dtype)),
            (x, U), dy, ("y", "dx", "dU"),
        )  # fmt: skip


def test_pairs_of_one_vector_are_the_identity():
    """As HRA starts."""
    x, W = torch.randn(4, 12), torch.randn(6, 12)
    U = torch.randn(12, 3).repeat_interleave(2, dim=1)
    torch.testing.assert_close(lk.householder_linear(x, W, U), x @ W.T)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, D, b, shared", ((1, 1, 3, False), (7, 6, 4, False), (33, 16, 2, False), (5, 3, 32, True)))
def test_blocks(M, D, b, shared, dtype, backend):
    generator = torch.Generator().manual_seed(D)
    x, dy = (torch.randn(M, D * b, generator=generator).to(dtype) for _ in range(2))
    R = torch.randn(1 if shared else D, b, b, generator=generator)
    with lk.backend(backend):
        compare(lk.block_rotate, rotate_dense, (x, R), dy, ("y", "dx", "dR"))


def test_a_cayley_transform_is_a_rotation_that_keeps_lengths():
    A = torch.randn(6, 4, 4, dtype=torch.float64, requires_grad=True)
    R = cayley((A - A.mT) / 2)
    torch.testing.assert_close(R @ R.mT, torch.eye(4, dtype=torch.float64).expand(6, 4, 4))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(6, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda A: cayley((A - A.mT) / 2), A)
    x = torch.randn(5, 24)
    torch.testing.assert_close(lk.block_rotate(x, R.float()).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize(
    "changed, error, words",
    (
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(3, 7)}, ValueError, "weight must be"),
        ({"weight": torch.zeros(4, 6, dtype=torch.float16)}, TypeError, "weight and U"),
        ({"U": torch.zeros(5, 2)}, ValueError, r"U must be \[6, r\]"),
        ({"U": torch.zeros(6, 0)}, ValueError, r"U must be \[6, r\]"),
        ({"U": torch.zeros(6, 2, dtype=torch.int32)}, TypeError, "U must be"),
        ({"U": torch.zeros(6, 2, device="meta")}, ValueError, "U is on meta"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[4\]"),
    ),
)
def test_bad_reflections(changed, error, words):
    given = {"x": torch.zeros(3, 6), "weight": torch.zeros(4, 6), "U": torch.ones(6, 2)}
    with pytest.raises(error, match=words):
        lk.householder_linear(**{**given, **changed})


@pytest.mark.parametrize(
    "x, R, error, words",
    (
        (torch.zeros(3, 7), torch.zeros(2, 3, 3), ValueError, "R must be"),
        (torch.zeros(3, 6), torch.zeros(2, 3, 2), ValueError, "R must be"),
        (torch.zeros(3, 6), torch.zeros(3, 3, 3), ValueError, "R must be"),
        (torch.zeros(3, 6), torch.zeros(6, 6), ValueError, "R must be"),
        (torch.zeros(3, 6), torch.zeros(2, 3, 3, dtype=torch.bfloat16), TypeError, "R must be"),
        (torch.zeros(3, 6), None, TypeError, "R must be a tensor"),
    ),
)
def test_bad_blocks(x, R, error, words):
    with pytest.raises(error, match=words):
        lk.block_rotate(x, R)
