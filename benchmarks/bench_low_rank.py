"""``bgmv`` and ``sgmv`` at the size of a large model's layer against plain PyTorch, and what a call costs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import OURS, check, compare
from roofs import Work, beyond_cache, timed

import lora_kernels as lk
from lora_kernels.testing import low_rank_oracle, low_rank_plain, low_rank_terms

K = N = 4096
R, L = 16, 8
LOOP, GATHER, READ = "addmm loop", "gather + einsum", "one torch.sum of the factors"
CALLS = 2000  # of a tiny call that are timed together
LAYERS = 64  # calls of bgmv with other adapters each, as a step of decoding makes them, that are timed together


class ColdAdapters:
    """Sets of L adapters, more than any cache holds, taken in order: each has left the cache when it comes again."""

    def __init__(self, few=8):
        generator = torch.Generator().manual_seed(0)
        self.bytes = 2 * L * R * (K + N)
        count = beyond_cache() // self.bytes
        A = torch.randn(few, L * R * K, generator=generator) / K**0.5
        B = torch.randn(few, L * N * R, generator=generator)
        self.sets = torch.cat([A, B], 1).bfloat16().repeat(-(-count // few), 1)
        self.at = 0

    def __len__(self):
        return len(self.sets)

    def __next__(self):
        self.at = (self.at + 1) % len(self)
        A, B = self.sets[self.at].split([L * R * K, L * N * R])
        return A.view(L, R, K), B.view(L, N, R)


@pytest.fixture(scope="module")
def cold():
    return ColdAdapters()


class Batch:
    """M rows over all adapters, the rows of an adapter together; ``calls`` with other adapters are timed at once."""

    def __init__(self, M, calls):
        self.calls = calls
        generator = torch.Generator().manual_seed(M)
        self.x0, self.y0 = (torch.randn(M, size, generator=generator).bfloat16() for size in (K, N))
        self.x, self.y = self.x0.clone(), self.y0.clone()
        self.ids = torch.arange(M) * L // M
        self.indptr = torch.arange(L + 1) * M // L
        self.adapters = torch.arange(L)
        self.segments = [slice(a, b) for a, b in zip(self.indptr[:-1].tolist(), self.indptr[1:].tolist(), strict=True)]

    def bgmv(self, A, B):
        lk.bgmv(self.y, self.x, A, B, self.ids)

    def sgmv(self, A, B):
        lk.sgmv(self.y, self.x, A, B, self.indptr, self.adapters)

    def loop(self, A, B):
        """What one writes by hand for rows that are sorted already."""
        for rows, a, b in zip(self.segments, A, B, strict=True):
            self.y[rows].addmm_(self.x[rows] @ a.T, b.T)

    def gather(self, A, B):
        v = torch.einsum("mk,mrk->mr", self.x, A[self.ids])
        self.y += torch.einsum("mr,mnr->mn", v, B[self.ids])

    def read(self, A, B):
        """A lower bound: the factors, which lie side by side, are read and nothing is done with them."""
        torch.as_strided(A, (A.numel() + B.numel(),), (1,)).view(torch.float32).sum()

    def refill(self):
        """x and y as a layer finds them: just written, so in cache where they fit."""
        self.x.copy_(self.x0)
        self.y.copy_(self.y0)

    def step(self, call, adapters):
        self.refill()
        several = [next(adapters) for _ in range(self.calls)]

        def run():
            for A, B in several:
                call(A, B)

        return timed(run) / self.calls

    def result(self, call, A, B):
        self.refill()
        call(A, B)
        return self.y.clone()

    def work(self, adapters):
        """The factors read; once, with one call, x and y too and y written: with more they stay in cache."""
        rows = 2 * self.x.numel() + 4 * self.y.numel() if self.calls == 1 else 0
        return Work(2 * len(self.x) * R * (K + N), adapters.bytes + rows)


@torch.no_grad()
def case_of(group, batch, calls, adapters, rounds, roofs, probes):
    A, B = next(adapters)
    args = (batch.y0, batch.x0, A, B, batch.ids)
    results = {name: batch.result(call, A, B) for name, call in calls.items() if name != READ}
    check(results, low_rank_oracle(*args), low_rank_plain(*args), what=group)
    return compare(
        group,
        {name: partial(batch.step, call, adapters) for name, call in calls.items()},
        rounds,
        roofs=roofs,
        probes=probes,
        work=dict.fromkeys(calls, batch.work(adapters)),
        M=len(batch.x),
        K=K,
        N=N,
        R=R,
        L=L,
        dtype="bfloat16",
        adapter_bytes=adapters.bytes,
        adapter_sets=len(adapters),
        calls=batch.calls,
    )


@pytest.fixture(scope="module", params=(8, 16, 32, 64))
def bgmv_case(request, cold, rounds, roofs):
    batch = Batch(request.param, LAYERS)
    calls = {OURS: batch.bgmv, LOOP: batch.loop, GATHER: batch.gather, READ: batch.read}
    group = f"bgmv, {request.param} rows"
    return case_of(group, batch, calls, cold, rounds(31, 301, 8), roofs, ("read", "bfloat16"))


@pytest.mark.parametrize("provider", (OURS, LOOP, GATHER, READ))
def test_bgmv(replay, bgmv_case, provider):
    replay(bgmv_case, provider)


@pytest.fixture(scope="module", params=(1024,))
def sgmv_case(request, cold, rounds, roofs):
    batch = Batch(request.param, 1)
    calls = {OURS: batch.sgmv, LOOP: batch.loop}
    group = f"sgmv, {L} segments × {request.param // L} rows"
    return case_of(group, batch, calls, cold, rounds(31, 101, 10), roofs, ("read", "copy", "bfloat16"))


@pytest.mark.parametrize("provider", (OURS, LOOP))
def test_sgmv(replay, sgmv_case, provider):
    replay(sgmv_case, provider)


def tiny_calls():
    """One call of each op on a row of 16, and of ``torch.addmm`` for comparison."""
    generator = torch.Generator().manual_seed(0)
    y, x, A, B, weight = (
        torch.randn(shape, generator=generator) for shape in ((1, 16), (1, 16), (4, 16), (16, 4), (16, 16))
    )
    factors, ids, indptr = (A[None], B[None]), torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1])
    args = (y, x, *factors, ids)
    oracle, plain, noise = low_rank_oracle(*args), low_rank_plain(*args), 4 * 2**-24 * low_rank_terms(*args)
    for result in (
        lk.bgmv(y.clone(), x, *factors, ids),
        lk.sgmv(y.clone(), x, *factors, indptr, ids),
        lk.multi_lora(x, *factors, ids, y=y),
        lk.lora_linear(x, weight, A, B) - x @ weight.T + y,
    ):
        check({OURS: result}, oracle, plain, noise=2 * noise, what="on a tiny row")
    out, weight_t = y.clone(), weight.T
    return {
        "bgmv": lambda: lk.bgmv(out, x, *factors, ids),
        "sgmv": lambda: lk.sgmv(out, x, *factors, indptr, ids),
        "multi_lora": lambda: lk.multi_lora(x, *factors, ids, y=y),
        "lora_linear": lambda: lk.lora_linear(x, weight, A, B),
        "torch.addmm": lambda: torch.addmm(y, x, weight_t),
    }


TINY = ("bgmv", "sgmv", "multi_lora", "lora_linear", "torch.addmm")


@pytest.fixture(scope="module")
def overhead(rounds):
    def many(call):
        for _ in range(CALLS):
            call()

    def per_call(call):
        return timed(partial(many, call)) / CALLS

    with torch.no_grad():
        steps = {name: partial(per_call, call) for name, call in tiny_calls().items()}
    return compare("call overhead", steps, rounds(31, 31), M=1, K=16, N=16, R=4, L=1, dtype="float32")


@pytest.mark.parametrize("provider", TINY)
def test_call_overhead(replay, overhead, provider):
    replay(overhead, provider)


PROBES = ("read", "copy", "bfloat16", "float32")


@pytest.fixture(scope="module")
def roof_case(rounds, roofs):
    return compare(
        "roofs", {name: partial(roofs.probe, name) for name in PROBES}, rounds(11, 31, 10), amounts=roofs.amounts
    )


@pytest.mark.parametrize("provider", PROBES)
def test_roofs(replay, roof_case, provider):
    replay(roof_case, provider)
