"""The ``lora_linear`` kernels in the checking interpreter, against the reference in float64."""

import pytest
import torch
import triton
import triton.language as tl
from layouts import strided
from lora_kernels.kernels.triton import _device, dropout, lora_linear, low_rank

import lora_kernels as lk
from lora_kernels import select
from lora_kernels.ops import _lora_linear as ops
from lora_kernels.reference.dropout import dropout_mask, philox
from lora_kernels.reference.dropout import threshold as threshold_of
from lora_kernels.testing import LOW_RANK_DTYPES, assert_within_rule, bitwise_equal, rms

DTYPES = ("fp32", "bf16", "fp16", "bf16-masters", "fp16-masters")
# M, K, N, R: odd; K in several chunks, each a program's; several blocks of ranks; many rows, at one block and at more.
SIZES = ((1, 1, 1, 1), (5, 37, 29, 3), (9, 600, 72, 16), (20, 100, 70, 150), (300, 264, 130, 20), (270, 136, 24, 40))
SCALE = 0.7
SEED = torch.tensor([-0x123456789ABCDEF])


@pytest.fixture(autouse=True)
def triton_backend():
    with lk.backend("triton"):
        yield


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names = []
    for module in (low_rank, lora_linear):
        launch = module.launch

        def noting(kernel, *rest, launch=launch, **named):
            names.append(kernel.fn.__name__)
            return launch(kernel, *rest, **named)

        monkeypatch.setattr(module, "launch", noting)
    return names


def factors(dtypes, K, N, R):
    return (torch.randn(R, K) / K**0.5).to(dtypes.factors), torch.randn(N, R).to(dtypes.factors)


def in_fp64(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def check(op, args, changed=None):
    """An op against its reference: what it returns, and its first argument where it changes it; returns both."""
    first = (args[0].clone(), *args[1:])
    exact = in_fp64(args)
    plain = op.reference(*first), first[0]
    want = op.reference(*exact), exact[0]
    got = op(*args), args[0]
    results = [
        (f"result {i}", *r) for i, r in enumerate(zip(*(tuple_of(one[0]) for one in (got, want, plain)), strict=True))
    ]
    if changed:
        results.append((changed, got[1], want[1], plain[1]))
    half = args[0].dtype != torch.float32
    for what, g, w, p in results:
        assert g.dtype == p.dtype, what
        # A product of 16-bit factors that enters a gradient of theirs has 16 bits or more of its fp32 operand.
        assert_within_rule(g, w, p, noise=(2**-16 if half else 2**-20) * rms(w), what=what)
    return tuple_of(got[0])


def tuple_of(results):
    return (results,) if isinstance(results, torch.Tensor) else results


def seed_of(p):
    return None if p is None else SEED


@triton.jit
def kept_kernel(out, seed, threshold, first_row, first, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = first_row + tl.arange(0, ROWS).to(tl.int64)
    mask = dropout.kept(tl.load(seed), threshold, row, first, columns, WIDTH)
    at = out + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(at, mask.to(tl.int8), mask=mask | True)


@pytest.mark.parametrize("first_row", (0, 3, (1 << 32) // 5 - 1, 1 << 33, 1 << 50))
def test_the_counter_has_64_bits(first_row):
    """Rows that no test can hold, on both sides of where the low word overflows."""
    columns, rows, width, first = 37, 4, 16, 8
    out = torch.empty(rows, width, dtype=torch.int8)
    kept_kernel[(1,)](out, SEED, threshold_of(0.5), first_row, first, columns, ROWS=rows, WIDTH=width)
    counter = (first_row + torch.arange(rows))[:, None] * 5 + first // 8 + torch.arange(width // 8)
    words = philox(counter.reshape(-1), SEED)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], 1)
    assert torch.equal(out.bool(), (halves >= threshold_of(0.5)).view(rows, width))


@pytest.mark.parametrize(
    "shape, p",
    [
        *(((3, 7, 9), p) for p in (0.0, 2**-16, 0.05, 0.5, 1.0)),
        *((shape, 0.5) for shape in ((1, 1), (0, 16), (33, 520), (10, 1031))),
    ],
)
def test_dropout(shape, p):
    kinds = (torch.float32, SEED), (torch.bfloat16, torch.tensor([7])), (torch.float16, SEED * 3)
    for dtype, seed in kinds if len(shape) > 2 else kinds[:1]:
        x = torch.randn(shape).to(dtype)
        x[..., 0] = float("nan")
        want = ops.lora_dropout.reference(x, seed, p)
        assert bitwise_equal(ops.lora_dropout(x, seed, p), want)
        assert bitwise_equal(ops.lora_dropout(strided(x), seed, p), want)
        assert bitwise_equal(
            ops.lora_dropout(x.transpose(0, 1), seed, p), ops.lora_dropout.reference(x.transpose(0, 1), seed, p)
        )


def masks(M, K, p):
    """The mask as each kernel has it: lora_dropout's, the shrink's, and both of the gradients'."""
    x, A = torch.ones(M, K), torch.eye(K)
    yield ops.lora_dropout(x, SEED, p)
    yield ops.lora_down(x, A, SEED, p)
    yield ops.lora_forward_(torch.zeros(M, 3), x, A, torch.zeros(3, K), None, None, None, None, SEED, p, 1.0)
    dx = torch.zeros(M, K)
    dA = ops.lora_in_grads_(dx, torch.ones(M, 1), torch.zeros(M, K), torch.ones(1, K), SEED, p, 1.0)
    assert not dA.any()
    yield dx
    yield ops.lora_in_grads_(torch.empty(0), torch.eye(M), x, torch.zeros(M, K), SEED, p, 1.0)


@pytest.mark.parametrize("M, K, p", ((3, 21, 0.05), (3, 21, 0.5), (50, 130, 0.5), (300, 40, 0.05)))
def test_every_kernel_has_the_mask(M, K, p):
    want = dropout_mask(SEED, M, K, p)
    assert 0 < want.sum() < want.numel()
    for mask in masks(M, K, p):
        assert torch.equal(mask, want.float())


def other_order(key, threshold, row, first, columns, WIDTH):
    counter = (first // 8 + tl.arange(0, WIDTH // 8))[None, :] * 1000 + row[:, None]
    low = counter.to(tl.uint32)
    none = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(key, low, none, none, none, dropout.ROUNDS)
    halves = tl.join(*(tl.join(tl.join(w0, w2), tl.join(w1, w3)) >> shift & 0xFFFF for shift in (0, 16)))
    return tl.reshape(halves, [row.shape[0], WIDTH]) >= threshold


@pytest.mark.parametrize("mistake", ("rounds", "counter", "threshold"))
def test_another_mask_is_noticed(mistake, monkeypatch):
    M, K, p = 20, 130, 0.5
    if mistake == "rounds":
        monkeypatch.setattr(dropout, "ROUNDS", tl.constexpr(10))
    elif mistake == "threshold":
        p += 2**-4
    else:
        for module in (low_rank, lora_linear):
            kernels = __import__(module.__name__ + "_kernels", fromlist=["kept"])
            monkeypatch.setattr(kernels, "kept", triton.jit(other_order))
    want = dropout_mask(SEED, M, K, 0.5).float()
    assert not any(torch.equal(mask, want) for mask in masks(M, K, p))


def each(combinations, few):
    """Every dtype and small size with the first combinations, some dtypes with many rows; the others at one size."""
    many = dict(zip(SIZES[4:], (("fp32", "bf16", "fp16-masters"), ("fp16", "bf16-masters")), strict=True))
    return [
        pytest.param(name, *size, one, id=f"{name}-{'-'.join(map(str, size))}-{one or 'none'}")
        for one in combinations
        for name in DTYPES
        for size in SIZES
        if (combinations.index(one) < few and name in many.get(size, DTYPES))
        or (size == SIZES[2] and name in ("fp32", "bf16"))
    ]


@pytest.mark.parametrize("name, M, K, N, R, columns", each(("", "cezb", "c", "z", "ez", "b"), 2))
def test_forward(name, M, K, N, R, columns):
    dtypes = LOW_RANK_DTYPES[name]
    p = {"": None, "c": 0.0, "z": 0.05}.get(columns, 0.5)
    x, y, other = (torch.randn(M, n).to(dtypes.x) for n in (K, N, N))
    A, B = factors(dtypes, K, N, R)
    c, e, bias = torch.randn(N), torch.randn(N), torch.randn(N)
    bias = bias if R % 2 else bias.to(dtypes.x)
    given = [t if kind in columns else None for t, kind in ((c, "c"), (other, "z"), (e, "e"), (bias, "b"))]
    check(ops.lora_forward_, (y, x, A, B, *given, seed_of(p), p or 0.0, SCALE), "y")


@pytest.mark.parametrize("name", ("fp32", "bf16"))
@pytest.mark.parametrize("M, K, N, R", SIZES[2:5])
def test_forward_has_the_bits_of_low_rank(name, M, K, N, R, launched):
    """Also where v is summed in the second kernel."""
    dtypes = LOW_RANK_DTYPES[name]
    x, y = torch.randn(M, K).to(dtypes.x), torch.randn(M, N).to(dtypes.x)
    A, B = factors(dtypes, K, N, R)
    ids = torch.zeros(M, dtype=torch.int64)
    got = y.clone()
    v = ops.lora_forward_(got, x, A, B, None, None, None, None, None, 0.0, SCALE)
    assert launched == ["shrink_kernel", "expand_kernel"]
    want = lk.bgmv(y.clone(), x, A[None], B[None], ids, scaling=SCALE)
    assert bitwise_equal(got, want)
    assert bitwise_equal(v, lk.bgmv_shrink(x, A[None], ids)[0])
    assert not torch.equal(got, y)


@pytest.mark.parametrize("name, M, K, N, R, columns", each(("", "tbc", "t", "tb", "c"), 2))
def test_out_grads(name, M, K, N, R, columns):
    dtypes = LOW_RANK_DTYPES[name]
    dy, y, v, B = torch.randn(M, N).to(dtypes.x), torch.randn(M, N).to(dtypes.x), torch.randn(M, R), torch.randn(N, R)
    given = [
        t if kind in columns else None
        for t, kind in ((y, "t"), (torch.randn(N).to(dtypes.x), "b"), (torch.randn(N), "c"))
    ]
    for need in ((True, True), (True, False), (False, True), (False, False)):
        results = check(ops.lora_out_grads, (dy, v, B.to(dtypes.factors), *given, SCALE, *need))
        assert [bool(r.numel()) for r in results] == [*need, "c" in columns, "t" in columns]


@pytest.mark.parametrize("name, M, K, N, R, p", each((0.5, None, 0.05), 1))
def test_in_grads(name, M, K, N, R, p):
    dtypes, M = LOW_RANK_DTYPES[name], min(M, 140)  # of which a program takes 64
    dx, x, dv = torch.randn(M, K).to(dtypes.x), torch.randn(M, K).to(dtypes.x), torch.randn(M, R)
    A, _ = factors(dtypes, K, N, R)
    rest = A, seed_of(p), p or 0.0, SCALE
    (dA,) = check(ops.lora_in_grads_, (dx.clone(), dv, x, *rest), "dx")
    (none,) = check(ops.lora_in_grads_, (dx.clone(), dv, None, *rest), "dx")
    assert not none.numel()
    assert bitwise_equal(ops.lora_in_grads_(dx.new_empty(0), dv, x, *rest), dA)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("name", LOW_RANK_DTYPES)
def test_weight_norm(name, transposed):
    dtypes, (N, K, R) = LOW_RANK_DTYPES[name], (70, 130, 12)
    W = (torch.randn(K, N).T if transposed else torch.randn(N, K)).to(dtypes.x)
    A, B = factors(dtypes, K, N, R)
    W[0] = -(B[0].float() @ A.float()) * SCALE  # which leaves next to nothing
    check(ops.lora_weight_norm, (W, A, B, W.float().square().sum(1), SCALE))


@pytest.mark.parametrize("name", ("fp32", "bf16"))
@pytest.mark.parametrize("M, K, N, R", SIZES[2:])
def test_tiles_of_amd(name, M, K, N, R, monkeypatch):
    monkeypatch.setattr(_device, "gpu", lambda device: select.Gpu())
    test_forward(name, M, K, N, R, "cezb")
    test_out_grads(name, M, K, N, R, "tbc")
    test_in_grads(name, M, K, N, R, 0.5)


@pytest.mark.parametrize("M, K, N, R", SIZES[4:])
def test_tiles_of_hopper(M, K, N, R, monkeypatch):
    """Its shrink's are taller; the others are of all NVIDIA's."""
    monkeypatch.setattr(_device, "gpu", lambda device: select.Gpu((9, 0), 227 * 1024))
    monkeypatch.setattr(_device, "overlap", lambda device, wanted: {"OVERLAP": False})
    test_forward("bf16", M, K, N, R, "cezb")


@pytest.mark.parametrize("R, count", ((16, 4), (40, 5), (150, 5)))
@pytest.mark.parametrize("p", (None, 0.5))
def test_launches(R, count, p, launched):
    M, K, N, dtype = 40, 600, 80, torch.bfloat16
    x, y, dy, dx = (torch.randn(M, n).to(dtype) for n in (K, N, N, K))
    A, B = factors(LOW_RANK_DTYPES["bf16"], K, N, R)
    v = ops.lora_forward_(y, x, A, B, None, None, None, None, seed_of(p), p or 0.0, SCALE)
    assert launched == ["shrink_kernel", "expand_kernel"]
    launched.clear()
    dv = ops.lora_out_grads(dy, v, B, None, None, None, SCALE, True, True)[0]
    ops.lora_in_grads_(dx, dv, x, A, seed_of(p), p or 0.0, SCALE)
    assert len(launched) == count, launched


@pytest.mark.parametrize("name", ("fp32", "bf16"))
@pytest.mark.parametrize("R", (16, 40))
def test_any_strides(name, R):
    """The same bits as in rows side by side, and nothing written between or beside."""
    dtypes, M, K, N, p = LOW_RANK_DTYPES[name], 40, 72, 56, 0.5
    x, y, other, dy, dx = (torch.randn(2, M // 2, n).to(dtypes.x) for n in (K, N, N, N, K))
    A, B = factors(dtypes, K, N, R)
    c, e, bias = torch.randn(3, N)

    def turned(t):
        return t.transpose(0, 1).clone().transpose(0, 1)

    want_y, want_dx = y.clone(), dx.clone()
    v = ops.lora_forward_(want_y, x, A, B, c, other, e, bias, SEED, p, SCALE)
    dv, *want = ops.lora_out_grads(dy, v, B, y, bias, c, SCALE, True, True)
    dA = ops.lora_in_grads_(want_dx, dv, x, A, SEED, p, SCALE)
    for form in (strided, turned):
        got_y, got_dx, other_A = form(y), form(dx), A.T.contiguous().T
        around = [t if t._base is None else t._base.clone() for t in (got_y, got_dx)]
        beside = strided(c), form(other), strided(e), strided(bias)
        assert bitwise_equal(ops.lora_forward_(got_y, form(x), other_A, strided(B), *beside, SEED, p, SCALE), v)
        beside = form(y), strided(bias), strided(c)
        results = ops.lora_out_grads(form(dy), strided(v), strided(B), *beside, SCALE, True, True)
        for a, b in zip(results, (dv, *want), strict=True):
            assert bitwise_equal(a, b)
        assert bitwise_equal(ops.lora_in_grads_(got_dx, strided(dv), form(x), other_A, SEED, p, SCALE), dA)
        assert bitwise_equal(got_y, want_y)
        assert bitwise_equal(got_dx, want_dx)
        if form is strided:
            for t, before in zip((got_y, got_dx), around, strict=True):
                assert bitwise_equal(t._base[..., 1::2], before[..., 1::2])


@pytest.mark.parametrize("M, K, N", ((0, 24, 16), (3, 0, 16), (3, 24, 0)))
def test_nothing_to_do(M, K, N):
    R, y, bias = 4, torch.randn(M, N), torch.randn(N)
    x, A, B = torch.randn(M, K), torch.randn(R, K), torch.randn(N, R)
    check(ops.lora_forward_, (y, x, A, B, None, None, None, bias, SEED, 0.5, SCALE), "y")
    check(ops.lora_out_grads, (torch.randn(M, N), torch.randn(M, R), B, y, bias, bias, SCALE, True, True))
    check(ops.lora_in_grads_, (torch.randn(M, K), torch.randn(M, R), x, A, SEED, 0.5, SCALE), "dx")


def test_what_is_not_a_number_stays_in_its_row_or_is_dropped():
    x, A, B = torch.randn(40, 64), torch.randn(8, 64), torch.randn(24, 8)
    kept = dropout_mask(SEED, 40, 64, 0.5)
    x[~kept] = float("nan")
    v = ops.lora_forward_(torch.zeros(40, 24), x, A, B, None, None, None, None, SEED, 0.5, SCALE)
    dA = ops.lora_in_grads_(torch.empty(0), v, x, A, SEED, 0.5, SCALE)
    assert v.isfinite().all()
    assert dA.isfinite().all()
    x[3, kept[3]] = float("nan")
    v = ops.lora_forward_(torch.zeros(40, 24), x, A, B, None, None, None, None, SEED, 0.5, SCALE)
    assert v[3].isnan().all()
    assert v.isnan().sum() == 8
