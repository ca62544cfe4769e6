"""Random shapes, ids, ranks, strides and forms, against the float64 oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_kernels as lk
from lora_kernels.testing import (
    LOW_RANK_DTYPES,
    assert_within_rule,
    bitwise_equal,
    low_rank_oracle,
    low_rank_plain,
    low_rank_terms,
)

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def strided(draw, values):
    """The values somewhere in a larger tensor of NaN: any order of the axes, offset and step."""
    steps = [draw(st.integers(1, 2)) for _ in values.shape]
    offsets = [draw(st.integers(0, 3)) for _ in values.shape]
    order = draw(st.permutations(range(values.dim())))
    sizes = [values.shape[d] * steps[d] + offsets[d] for d in range(values.dim())]
    base = values.new_full([sizes[d] for d in order], float("nan"))
    back = [order.index(d) for d in range(values.dim())]
    view = base.permute(back)
    for d, (offset, step) in enumerate(zip(offsets, steps, strict=True)):
        view = view.narrow(d, offset, values.shape[d] * step)
        view = view[(slice(None),) * d + (slice(None, None, step),)]
    return view.copy_(values)


@st.composite
def calls(draw):
    """The arguments of a call: what bgmv takes."""
    dtypes = LOW_RANK_DTYPES[draw(st.sampled_from(sorted(LOW_RANK_DTYPES)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lead = (
        draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)) if draw(st.booleans()) else [draw(st.integers(0, 70))]
    )
    M = torch.Size(lead).numel()
    K, L = draw(st.integers(1, 150)), draw(st.integers(1, 5))
    listed = draw(st.booleans())
    S = 1 if listed else draw(st.integers(1, 3))
    N = [draw(st.integers(1, 90)) for _ in range(S)]
    R = draw(st.sampled_from((1, 2, 5, 8, 15, 16, 17, 32, 40)))
    widths = [draw(st.integers(1, R)) for _ in range(L)] if listed else [R] * L
    k = draw(st.sampled_from((0, 0, 1, 2, 3)))

    def random(*shape, dtype=torch.float32, scale=1.0):
        return draw(strided((torch.randn(shape, generator=generator) * scale).to(dtype)))

    form = draw(st.sampled_from(((), (L,), (S, L))))
    ranks = None
    if form and draw(st.booleans()):
        ranks = (torch.rand(form, generator=generator) * (torch.tensor(widths) + 1)).int()
    ids = torch.randint(
        -1, L, (M, k) if k else (M,), generator=generator, dtype=draw(st.sampled_from((torch.int32, torch.int64)))
    )
    A = [random(r, K, dtype=dtypes.factors, scale=K**-0.5) for r in widths]
    B = [random(N[0], r, dtype=dtypes.factors, scale=r**-0.5) for r in widths]
    if not listed:
        A = tuple(random(L, R, K, dtype=dtypes.factors, scale=K**-0.5) for _ in N)
        B = tuple(random(L, n, R, dtype=dtypes.factors, scale=R**-0.5) for n in N)
    return {
        "y": random(*lead, sum(N), dtype=dtypes.y),
        "x": random(*lead, K, dtype=dtypes.x),
        "A": A,
        "B": B,
        "adapter_ids": ids,
        "scaling": draw(st.sampled_from((None, 0.5))) if not form else torch.rand(form, generator=generator) + 0.5,
        "ranks": ranks,
        "weights": torch.rand(M, k, generator=generator) + 0.25 if k else None,
    }


def check(a):
    oracle, plain = low_rank_oracle(**a), low_rank_plain(**a)
    noise = max(a["x"].shape[-1], 16) ** 0.5 * 2**-24 * low_rank_terms(**a)
    got = lk.multi_lora(**a)
    # In a sample of a few elements plain PyTorch may be exact by luck; half a unit in the last place is not an error.
    if got.dtype != torch.float32 and got.numel() < 500:
        assert_within_rule(got.float(), oracle, plain.float(), noise=torch.finfo(got.dtype).eps / 2 * largest(oracle))
    else:
        assert_within_rule(got, oracle, plain, noise=noise)
    y = a["y"]
    base = y if y._base is None else y._base
    before = base.clone()
    written = lk.bgmv(**a).clone()
    assert bitwise_equal(written, got)
    y.copy_(before.as_strided(y.shape, y.stride(), y.storage_offset()))
    assert bitwise_equal(base, before)


def largest(t):
    return float(t.abs().max()) if t.numel() else 0.0


@pytest.mark.parametrize("name", ("reference", "cpu"))
def test_quick(name, request):
    request.getfixturevalue("cpu_backend") if name == "cpu" else None
    with lk.backend(name):
        QUICK(given(calls())(check))()


@pytest.mark.slow
@pytest.mark.parametrize("name", ("reference", "cpu"))
def test_long(name, request):
    request.getfixturevalue("cpu_backend") if name == "cpu" else None
    with lk.backend(name):
        LONG(given(calls())(check))()


def check_gradients(a):
    """Gradients by the float64 oracle, in float32."""
    names = ["x", "y", *(["weights"] if a["weights"] is not None else [])]
    dy = torch.randn(a["y"].shape)
    results = []
    for function, dtype in ((lk.multi_lora, torch.float32), (low_rank_oracle, torch.float64)):
        leaf = {n: a[n].detach().to(dtype).requires_grad_() for n in names}
        A, B = ([t.detach().to(dtype).requires_grad_() for t in a[n]] for n in ("A", "B"))
        form = type(a["A"])
        out = function(**{**a, **leaf, "A": form(A), "B": form(B)})
        results.append(torch.autograd.grad(out, [*leaf.values(), *A, *B], dy.to(dtype), materialize_grads=True))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("reference", "cpu"))
def test_gradients(name, request):
    request.getfixturevalue("cpu_backend") if name == "cpu" else None
    with lk.backend(name):
        QUICK(given(calls())(check_gradients))()


@pytest.mark.slow
def test_gradients_long(cpu_backend):
    LONG(given(calls())(check_gradients))()
