"""What strided ids, weights and factors must give, on any device: the bits of contiguous ones."""

import torch

import lora_kernels as lk
from lora_kernels.testing import bitwise_equal


def strided(t):
    """The same values, every other element of something larger."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 1)
    wide[..., ::2] = t
    return wide[..., ::2]


def ids_and_weights(device):
    torch.manual_seed(0)
    x, y, A, B = (torch.randn(s, device=device) for s in ((12, 40), (12, 24), (3, 4, 40), (3, 24, 4)))
    ids, pairs = (torch.randint(-1, 3, s, device=device) for s in ((12,), (12, 2)))
    weights = torch.rand(12, 2, device=device)
    want = lk.bgmv(y.clone(), x, A, B, ids)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, strided(ids)), want)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, torch.stack([ids, ids], 1)[:, 0]), want)
    same = lk.bgmv(y.clone(), x, A, B, torch.full_like(ids, 2))
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, torch.full_like(ids[:1], 2).expand(12)), same)
    want = lk.bgmv(y.clone(), x, A, B, pairs, weights=weights)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, strided(pairs), weights=strided(weights)), want)
    column = lk.bgmv(y.clone(), x, A, B, pairs[:, :1], weights=weights[:, :1])
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, pairs[:, :1].clone(), weights=weights[:, :1].clone()), column)


def slices(device):
    torch.manual_seed(0)
    x, y, A = torch.randn(6, 40, device=device), torch.randn(6, 17, device=device), torch.randn(2, 4, 40, device=device)
    B = torch.randn(2, 1, 4, device=device), torch.randn(2, 16, 4, device=device)
    ids = torch.arange(6, device=device) % 2
    want = lk.bgmv(y.clone(), x, (A, A), B, ids)
    odd = B[0].clone().as_strided((2, 1, 4), (4, 1, 1))
    assert bitwise_equal(lk.bgmv(y.clone(), x, (A, A), (odd, B[1]), ids), want)


CHECKS = (ids_and_weights, slices)
