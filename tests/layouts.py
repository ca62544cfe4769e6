"""What other layouts of the same numbers must give, on any device: strided, packed, sorted, listed."""

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


def pool_of(device):
    """(a pool, the same as tuples A and B, ranks): a packed A, as in SGLang's pool, of slices at rows by rank."""
    torch.manual_seed(0)
    S, L, R, K, widths = 3, 4, 8, 72, (24, 8, 8)
    ranks = torch.tensor([8, 3, 0, 5], dtype=torch.int32, device=device)
    A = [torch.randn(L, R, K, device=device) for _ in range(S)]
    pool = torch.full((L, S * R, K), float("nan"), device=device)
    for l, r in enumerate(ranks.tolist()):
        for s in range(S):
            pool[l, s * r : (s + 1) * r] = A[s][l, :r]
    whole = torch.randn(L, sum(widths), R, device=device)
    B = whole.split(widths, 1)
    return pool, A, B, ranks


def packed(device):
    """One A with its slices at rows that depend on each adapter's rank."""
    pool, A, B, ranks = pool_of(device)
    L, K, N = len(ranks), pool.shape[2], sum(b.shape[1] for b in B)
    for M in (7, 300):
        x, y = torch.randn(M, K, device=device), torch.randn(M, N, device=device)
        ids, scaling = torch.randint(-1, L, (M,), device=device), torch.rand(L, device=device)
        want = lk.bgmv(y.clone(), x, A, B, ids, scaling=scaling, ranks=ranks)
        got = lk.bgmv(y.clone(), x, pool, B, ids, scaling=scaling, ranks=ranks)
        torch.testing.assert_close(got, want)
        assert not torch.equal(got, y)
        plan = lk.BatchPlan.from_ids(ids, L)
        assert bitwise_equal(lk.sgmv(y.clone(), x, pool, B, plan, scaling=scaling, ranks=ranks), got)
        full = torch.cat(A, 1)
        torch.testing.assert_close(lk.bgmv(y.clone(), x, full, B, ids), lk.bgmv(y.clone(), x, A, B, ids))


def packed_gradients(device):
    pool, A, B, ranks = pool_of(device)
    S, L = len(B), len(ranks)
    x, y = torch.randn(9, pool.shape[2], device=device), torch.randn(9, sum(b.shape[1] for b in B), device=device)
    ids = torch.randint(-1, L, (9,), device=device)
    pool, B = pool.nan_to_num().requires_grad_(), [b.clone().requires_grad_() for b in B]
    A = [a.clone().requires_grad_() for a in A]
    got = torch.autograd.grad(lk.multi_lora(x, pool, B, ids, ranks=ranks, y=y).sum(), [pool, *B])
    want = torch.autograd.grad(lk.multi_lora(x, A, B, ids, ranks=ranks, y=y).sum(), [*A, *B])
    for l, r in enumerate(ranks.tolist()):
        for s in range(S):
            torch.testing.assert_close(got[0][l, s * r : (s + 1) * r], want[s][l, :r])
        assert not bool(got[0][l, S * r :].any())
    for g, w in zip(got[1:], want[S:], strict=True):
        torch.testing.assert_close(g, w)


def a_size_of_one(device):
    """Stacks [L, 1, R, K] and [L, 1, N, R], as vLLM has them."""
    torch.manual_seed(0)
    x, y, ids = torch.randn(6, 40, device=device), torch.randn(6, 24, device=device), torch.arange(6, device=device) % 3
    A, B = (tuple(torch.randn(3, *size, device=device) for _ in range(2)) for size in ((4, 40), (12, 4)))
    want = lk.bgmv(y.clone(), x, A, B, ids)
    a, b = (tuple(t[:, None] for t in factors) for factors in (A, B))
    assert bitwise_equal(lk.bgmv(y.clone(), x, a, b, ids), want)
    assert bitwise_equal(lk.multi_lora(x, a, b, ids, y=y), want)
    alone = lk.bgmv(y[:, :12].clone(), x, A[0], B[0], ids)
    assert bitwise_equal(lk.bgmv(y[:, :12].clone(), x, a[0], b[0], ids), alone)
    v = lk.bgmv_shrink(x, a, ids)
    assert bitwise_equal(v, lk.bgmv_shrink(x, A, ids))
    assert bitwise_equal(lk.bgmv_expand(y.clone(), v, b, ids), want)


def sorted_rows(device):
    """A plan of rows in another order: ids or segments of a batch that an engine has sorted."""
    torch.manual_seed(0)
    M, L = 40, 5
    x, y, A, B = (torch.randn(s, device=device) for s in ((M, 40), (M, 24), (L, 4, 40), (L, 24, 4)))
    ids = torch.randint(-1, L, (M,), device=device)
    want = lk.bgmv(y.clone(), x, A, B, ids)
    by_id, order = ids.sort(stable=True)
    bounds = torch.searchsorted(by_id, torch.arange(-1, L + 1, device=device))
    names = torch.arange(-1, L, device=device)
    for dtype in (torch.int32, torch.int64):
        sorted_ids = lk.BatchPlan.from_ids(by_id.to(dtype), L, order=order.to(dtype))
        segments = lk.BatchPlan.from_segments(bounds.to(dtype), names.to(dtype), L, order=order.to(dtype))
        updated = lk.BatchPlan.empty(64, L, device).update_(
            names.to(dtype), seg_indptr=bounds.to(dtype), order=order.to(dtype)
        )
        for plan in (sorted_ids, segments, updated):
            assert plan.num_pairs == M
            assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, plan), want)
    pairs, weights = torch.randint(-1, L, (M, 2), device=device), torch.rand(M, 2, device=device)
    of_pairs = torch.randperm(2 * M, device=device)
    mixture = lk.BatchPlan.from_ids(pairs.flatten()[of_pairs].view(M, 2), L, order=of_pairs)
    mixed = lk.bgmv(y.clone(), x, A, B, pairs, weights=weights)
    torch.testing.assert_close(lk.bgmv(y.clone(), x, A, B, mixture, weights=weights), mixed)
    random = torch.randperm(M, device=device)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, lk.BatchPlan.from_ids(ids[random], L, order=random)), want)
    unsorted = lk.BatchPlan.empty(M, L, device).update_(
        torch.tensor([3, -1, 0], device=device), seg_indptr=torch.tensor([0, 4, 4, M], device=device)
    )
    ids = torch.tensor([3] * 4 + [0] * (M - 4), device=device)
    assert bitwise_equal(lk.bgmv(y.clone(), x, A, B, unsorted), lk.bgmv(y.clone(), x, A, B, ids))


def lists(device):
    """Matrices of any strides, few and many."""
    torch.manual_seed(0)
    x, y = torch.randn(90, 40, device=device), torch.randn(90, 24, device=device)
    for L in (2, 5, 70):
        ids = torch.arange(90, device=device) % (L + 1) - 1
        ranks = [1 + l % 6 for l in range(L)]
        A, B = [torch.randn(r, 40, device=device) for r in ranks], [torch.randn(24, r, device=device) for r in ranks]
        want = lk.bgmv(y.clone(), x, A, B, ids)
        stacks = torch.zeros(L, 6, 40, device=device), torch.zeros(L, 24, 6, device=device)
        for l, r in enumerate(ranks):
            stacks[0][l, :r], stacks[1][l, :, :r] = A[l], B[l]
        torch.testing.assert_close(want, lk.bgmv(y.clone(), x, *stacks, ids))
        mixed = [a.T.contiguous().T if l % 2 else strided(a) for l, a in enumerate(A)]
        torch.testing.assert_close(lk.bgmv(y.clone(), x, mixed, [strided(b) for b in B], ids), want)


CHECKS = (ids_and_weights, slices, packed, packed_gradients, a_size_of_one, sorted_rows, lists)
