"""QWHA's initialisation of a layer, beside one output channel after the other, as QWHA's own code does it and leaner.

A loop takes a full solve for the residual's spectrum, and for each channel the largest coefficients and
torch.linalg.solve of their normal equations. QWHA's own makes the sizes of the columns again for each channel and keeps
places and values in lists; the lean one does neither. All begin with the Gram matrix; the loops' root of it is not
timed.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from compare import OURS, compare
from roofs import timed
from torch import Tensor

import lora_kernels as lk
from lora_kernels.init import ada_alloc, qwha_init

K = N = 1024
RANK = 64  # of LoRA with as many parameters
DAMPING = 1e-4
OWN, LEAN = "QWHA's loop", "a lean loop"
TARGETS = {OWN: 20.0}  # how many times our time it takes


def roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R with Rᵀ R = gram, damped, and R Hᵀ."""
    eye = torch.eye(len(gram), dtype=gram.dtype)
    values, vectors = torch.linalg.eigh(gram + DAMPING * gram.diagonal().mean() * eye)
    R = values.clamp(min=0).sqrt()[:, None] * vectors.T
    return R, lk.wht(R)


def loop(residual: Tensor, n: int, R: Tensor, bases: Tensor, lean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, cols, values), the columns of ``bases`` being what a coefficient adds to a channel of R residualᵀ."""
    v = R @ residual.T
    x0 = torch.linalg.solve(bases, v)
    counts = ada_alloc(v.norm(dim=0), n, len(R)).tolist()
    sizes = bases.square().sum(0)
    places, values = [], []
    for i, p in enumerate(counts):
        if not lean:
            sizes = bases.square().sum(0)
        chosen = (sizes * x0[:, i].square()).topk(p).indices
        B = bases[:, chosen]
        found = torch.linalg.solve(B.T @ B, B.T @ v[:, i])
        places.append(torch.stack((torch.full((p,), i), chosen)) if lean else [(i, j) for j in chosen.tolist()])
        values.append(found if lean else found.tolist())
    if lean:
        return *torch.cat(places, 1), torch.cat(values)
    places, values = (list(itertools.chain.from_iterable(lists)) for lists in (places, values))
    return *torch.tensor(places).T, torch.tensor(values)


def left(residual: Tensor, gram: Tensor, values: Tensor, plan: lk.SpectralPlan) -> float:
    """‖(residual - ΔW) X‖ / ‖residual X‖ in float64."""
    rest = residual.double() - lk.spectral_delta_weight(values.double(), plan, kind="wht")
    gram = gram.double()
    return float(((rest @ gram * rest).sum() / (residual.double() @ gram * residual.double()).sum()).sqrt())


@pytest.fixture(scope="module")
def init_case(rounds):
    torch.manual_seed(0)
    n = RANK * (N + K)
    weight = torch.randn(N, K) * torch.rand(N, 1).add(0.2)
    residual = weight - lk.dequantize(lk.quantize(weight, "int4", group_size=64), torch.float32)
    X = torch.randn(4 * K, K) * torch.rand(K).mul(3).exp()
    gram = X.T @ X
    R, bases = roots(gram)
    init = qwha_init(residual, n, gram=gram, damping=DAMPING)
    loops = {name: partial(loop, residual, n, R, bases, name == LEAN) for name in (OWN, LEAN)}
    errors = {OURS: left(residual, gram, init.values, init.plan)}
    for name, call in loops.items():
        rows, cols, values = call()
        errors[name] = left(residual, gram, values, lk.SpectralPlan(rows, cols, shape=(N, K)))
        assert errors[OURS] < errors[name] * (1 + 1e-4), errors
    calls = {OURS: partial(qwha_init, residual, n, gram=gram, damping=DAMPING), **loops}
    return compare(
        "qwha initialisation",
        {name: partial(timed, call) for name, call in calls.items()},
        rounds(7, 31, 60),
        targets=TARGETS,
        errors=errors,
        before=init.report.before,
        n=n,
        K=K,
        N=N,
        R=RANK,
    )


@pytest.mark.parametrize("provider", (OURS, OWN, LEAN))
def test_initialisation(replay, init_case, provider):
    replay(init_case, provider)
