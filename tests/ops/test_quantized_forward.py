"""The functions of `quantized` on every backend, against the float64 oracle; and the bits of a weight unpacked."""

import functools

import pytest
import torch
from judging import judge
from layouts import strided

import lora_kernels as lk
from lora_kernels.ops import _dispatch, _quantized_panels
from lora_kernels.ops._quantized import dequantize_
from lora_kernels.testing import (
    QUANTIZED_DTYPES,
    adapter_count,
    as_segments,
    bitwise_equal,
    dequantize_oracle,
    quantized_expected,
    quantized_gradients,
    quantized_name,
    quantized_samples,
    quantized_upstream,
    quantized_weight,
    threads,
)

DTYPES = torch.float32, torch.bfloat16, torch.float16


def samples(name, *traits, without=()):
    found = quantized_samples(*QUANTIZED_DTYPES[name])
    return [s for s in found if s.traits >= set(traits) and not s.traits & set(without)]


@functools.cache
def named(name, dtypes="fp32"):
    (sample,) = (s for s in samples(dtypes) if s.name == name)
    return sample


def run(sample, count=1, **changes):
    a = {**sample.make(0), **changes}
    with threads(count), torch.no_grad():
        return getattr(lk, quantized_name(a))(**a)


def check(sample, count=1):
    """Within the rule with ``count`` threads."""
    y = run(sample, count)
    assert y.dtype == sample.make(0)["x"].dtype
    judge(y, *quantized_expected(sample)["y"], f"y of {sample.name}")


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
def test_reference(name):
    with lk.backend("reference"):
        for sample in samples(name):
            check(sample)


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
def test_every_instruction_set(name, isa):
    for sample in samples(name, without=("large",)):
        check(sample)


@pytest.fixture
def as_users_call(isa):
    """The compiled kernels in each instruction set, not forced: past the dispatcher where they take a call."""
    token = _dispatch._forced.set(None)
    yield
    _dispatch._forced.reset(token)


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
def test_every_instruction_set_unforced(name, as_users_call):
    for sample in samples(name, without=("large",)):
        check(sample)


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
def test_several_panels(name, cpu_backend, monkeypatch):
    """Products by torch over parts of a weight, as few columns of y at a time as there may be."""
    monkeypatch.setattr(_quantized_panels, "PANEL", 1)
    for sample in samples(name, without=("large",)):
        check(sample)


@pytest.mark.parametrize("name", ("fp32", "bf16", "bf16-masters"))
def test_large(name, isa):
    for sample in samples(name, "large"):
        check(sample)


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
def test_two_threads(name, cpu_backend):
    """Two threads change no bit of what torch has no product in, and twice the same bits with two."""
    alone = 0
    for sample in samples(name):
        check(sample, 2)
        y = run(sample, 2)
        assert bitwise_equal(y, run(sample, 2)), sample.name
        a = sample.make(0)
        if not torch.ops.lora_kernels_C.quantized_prefers_panels(a["x"], *a["weight"].packed):
            assert bitwise_equal(y, run(sample)), sample.name
            alone += 1
    assert alone > 20


ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 64, 65, 80)


@pytest.mark.parametrize("name", ("fp32", "bf16"))
@pytest.mark.parametrize(
    "size",
    (
        ("nf4", 70, 128, 64),
        ("int4", 65, 129, 32),
        ("int8", 33, 100, 0),
        ("fp4", 16, 64, 8),
        ("nf4", 3, 201, 0),
        ("nf4", 34, 400, 128),
        ("int4", 130, 300, 256),
    ),
    ids=str,
)
def test_every_number_of_rows(name, size, isa):
    """Alone and with an adapter, each count a sample of its own."""
    fmt, N, K, group = size
    dtype = QUANTIZED_DTYPES[name].x
    weight = quantized_weight(N, K, fmt, group, offsets=fmt == "int4", generator=torch.Generator().manual_seed(3))
    W, plain = dequantize_oracle(weight), dequantize_oracle(weight, dtype)
    x, A, B = torch.randn(max(ROWS), K).to(dtype), torch.randn(8, K).to(dtype) / 8, torch.randn(N, 8).to(dtype) / 8
    for rows in ROWS:
        m = x[:rows]
        noise = K**0.5 * 2**-24 * float((m.double() ** 2 @ W.T**2).mean().sqrt()) * 2
        alone = m.double() @ W.T, m @ plain.T, noise
        judge(lk.quantized_linear(m, weight), *alone, f"{rows} rows")
        v = (m.double() @ A.T.double()) @ B.T.double()
        both = alone[0] + v, alone[1] + (m @ A.T) @ B.T, noise + K**0.5 * 2**-24 * float(v.abs().max())
        judge(lk.quantized_lora_linear(m, weight, A, B), *both, f"{rows} rows with an adapter")


@pytest.mark.parametrize("K", (8 * 4096, 8 * 4097))
def test_many_groups(K, isa):
    """More of them than the kernels keep the scales of at a time."""
    weight, x = quantized_weight(5, K, "nf4", 8), torch.randn(20, K).bfloat16()
    W = dequantize_oracle(weight)
    for rows in (1, 4, 5, 20):
        y = lk.quantized_linear(x[:rows], weight)
        judge(y, x[:rows].double() @ W.T, x[:rows] @ W.bfloat16().T, 0.0, f"{rows} rows")


@pytest.mark.parametrize("rows", (3, 70))
@pytest.mark.parametrize("name", ("bf16-masters", "fp16-masters"))
def test_what_is_between_the_factors_may_be_large(name, rows, backend):
    """x Aᵀ beyond what fp16 holds, brought back by B: masters work in fp32."""
    weight, x = quantized_weight(40, 64), torch.randn(rows, 64).to(QUANTIZED_DTYPES[name].x)
    A, B = 3e4 * torch.randn(8, 64), 1e-5 * torch.randn(40, 8)
    want = x.double() @ dequantize_oracle(weight).T + (x.double() @ A.double().T) @ B.double().T
    plain = x @ dequantize_oracle(weight, x.dtype).T + ((x.float() @ A.T) @ B.T).to(x.dtype)
    judge(lk.quantized_lora_linear(x, weight, A, B), want, plain, 0.0, "y")


@pytest.mark.parametrize("name", ("fp32", "bf16-masters"))
def test_twice_the_same_bits_and_inputs_untouched(name, backend):
    for sample in samples(name, without=("large",)):
        a = sample.make(0)
        weight = a["weight"]
        tensors = [t for t in (*a.values(), *weight.packed, weight.order) if isinstance(t, torch.Tensor)]
        before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
        with torch.no_grad():
            y, again = (getattr(lk, quantized_name(a))(**a) for _ in range(2))
        assert bitwise_equal(y, again), sample.name
        assert all(bitwise_equal(t, b) for t, b in zip(tensors, before, strict=True)), sample.name
        assert [t._version for t in tensors] == versions


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
def test_with_gradients_a_layer_of_one_adapter_keeps_its_bits(name, backend):
    for sample in samples(name, without=("large", "multi")):
        a = sample.make(0)
        got = quantized_gradients(getattr(lk, quantized_name(a)), a, quantized_upstream(a))["y"]
        assert bitwise_equal(got, run(sample)), sample.name


@pytest.mark.parametrize("name", ("fp32", "bf16"))
def test_forms_of_ids(name, backend):
    """A plan of ids or of segments, and ids of any strides, give the bits of ids."""
    for sample in samples(name, "multi", without=("large",)):
        a, want = sample.make(0), run(sample)
        ids, L = a["adapter_ids"], adapter_count(a["A"])
        got = {"a plan": run(sample, adapter_ids=lk.BatchPlan.from_ids(ids, L))}
        room = lk.BatchPlan.empty(ids.numel() + 7, L).update_(ids)
        got |= {"a plan with room": run(sample, adapter_ids=room), "strided": run(sample, adapter_ids=strided(ids))}
        if "mixture" not in sample.traits and ids.numel():
            segments = as_segments(ids)
            if segments[0][-1] == ids.numel():
                plan = lk.BatchPlan.from_segments(*segments, L)
                got["a plan of segments"] = run(sample, adapter_ids=plan)
        for form, y in got.items():
            assert bitwise_equal(y, want), f"{sample.name}: {form}"


def test_forms_of_factors(backend):
    """A stack, a tuple of one, a size of 1 after L, and what follows a default."""
    a = named("m31-multi").make(0)
    x, weight, A, B, ids = (a[n] for n in ("x", "weight", "A", "B", "adapter_ids"))
    A, B = A.nan_to_num(), B.nan_to_num()
    want = lk.quantized_multi_lora_linear(x, weight, A, B, ids)
    ones = torch.ones(len(A))
    for factors, options in (
        (((A,), (B,)), {}), ((A[:, None], B[:, None]), {}), ((A, B), {"scaling": 1}), ((A, B), {"scaling": ones}),
        ((A, B), {"ranks": torch.full((len(A),), 8, dtype=torch.int32)}),
    ):  # fmt: skip
        assert bitwise_equal(lk.quantized_multi_lora_linear(x, weight, *factors, ids, **options), want)
    torch.testing.assert_close(lk.quantized_multi_lora_linear(x, weight, list(A), list(B), ids), want)


def test_one_adapter_of_many_is_one_adapter(backend):
    a = named("m31").make(0)
    x, weight, A, B = (a[n] for n in ("x", "weight", "A", "B"))
    ids = torch.zeros(len(x), dtype=torch.int64)
    one = lk.quantized_lora_linear(x, weight, A, B, scaling=0.5)
    many = lk.quantized_multi_lora_linear(x, weight, A[None], B[None], ids, scaling=0.5)
    torch.testing.assert_close(many, one)
    none = lk.quantized_multi_lora_linear(x, weight, A[None], B[None], ids - 1, scaling=0.5)
    torch.testing.assert_close(none, lk.quantized_linear(x, weight))


@pytest.mark.parametrize("sample", ("m17", "m9-whole-row", "m65-multi", "order", "m129-int8"))
def test_inference_mode(sample, route):
    """Needs no gradient, whatever requires grad."""
    sample = named(sample, "bf16-masters")
    want, a = run(sample), sample.make(0)
    for name in ("x", "A", "B"):
        if name in a:
            a[name].requires_grad_()
    function = getattr(lk, quantized_name(a))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            y = function(**a)
        assert bitwise_equal(y, want)
        assert not y.requires_grad


@pytest.mark.parametrize("name", QUANTIZED_DTYPES)
@pytest.mark.parametrize("sample", ("m17", "m5", "m64", "m65", "m5-multi", "bias-wide", "vector"))
def test_autocast(name, sample, route):
    """As if every argument but masters had been cast before: the bits, in autocast's dtype; gradients in their own."""

    def cast(t):
        return t.bfloat16() if t is not None and t.dtype != torch.float32 else t

    sample = named(sample, name)
    a, b = sample.make(0), sample.make(0)
    b |= {n: cast(b[n]) for n in ("bias", "A", "B") if n in b} | {"x": b["x"].bfloat16()}
    function, dy = getattr(lk, quantized_name(a)), quantized_upstream(b)

    def call(**a):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(**a)

    with torch.no_grad():
        assert bitwise_equal(call(**a), function(**b))
    want, got = quantized_gradients(function, b, dy), quantized_gradients(call, a, dy)
    for n, t in got.items():
        assert t.dtype == (torch.bfloat16 if n == "y" else a[n[1:]].dtype)
        assert bitwise_equal(t, want[n].to(t.dtype)), n


@functools.cache
def weights():
    """A weight of each kind that the samples have, by the sample's name."""
    return {s.name: s.make(0)["weight"] for s in samples("fp32") if s.name != "m300-multi"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_bits(dtype, isa):
    for name, weight in weights().items():
        want = dequantize_oracle(weight, dtype)
        for count in (1, 2):
            with threads(count):
                assert bitwise_equal(lk.dequantize(weight, dtype), want), name


@pytest.mark.parametrize("dtype", (*DTYPES, None))
def test_dequantized_bits_of_the_reference(dtype):
    with lk.backend("reference"):
        for name, weight in weights().items():
            want = dequantize_oracle(weight, dtype or torch.bfloat16)
            assert bitwise_equal(lk.dequantize(weight, dtype), want), name
            assert bitwise_equal(weight.dequantize(dtype), want), name


def test_every_code(isa):
    """Each of a format's values in every place of a row, by scales whose products round."""
    for fmt, count in (("nf4", 16), ("fp4", 16), ("int4", 16), ("int8", 256)):
        weight = quantized_weight(count, 67, fmt, 16, offsets=True)
        row = torch.arange(count)
        if fmt == "int8":
            weight.codes.copy_((row - 128).to(torch.int8)[:, None].expand_as(weight.codes))
        else:
            weight.codes.copy_((row * 17).to(torch.uint8)[:, None].expand_as(weight.codes))
        for dtype in DTYPES:
            got = lk.dequantize(weight, dtype)
            assert bitwise_equal(got, dequantize_oracle(weight, dtype)), fmt
        assert len(got[:, 0].unique()) > count // 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", (("nf4", 0), ("nf4", 64), ("fp4", 8), ("int4", 32), ("int4", 96), ("int8", 0), ("int8", 64)), ids=str
)
def test_panels(size, dtype, backend):
    """Any rows and columns of W into a tensor of any strides, and nothing beside it."""
    N, K = 37, 201
    weight = quantized_weight(N, K, *size, offsets=size[0] == "int4")
    W = dequantize_oracle(weight, dtype)
    for row, column, R, C in (
        (0, 0, N, K), (0, 0, 1, 1), (3, 0, 16, K), (36, 200, 1, 1), (5, 1, 7, 63), (5, 64, 7, 128), (0, 63, N, 66),
        (1, 7, 2, 16), (8, 96, 29, 105), (0, 32, N, 32), (4, 9, 0, 5), (37, 0, 0, K), (4, 9, 5, 0), (2, 201, 3, 0),
    ):  # fmt: skip
        want = W[row : row + R, column : column + C]
        wide, tall = torch.full((R + 2, 2 * C + 5), 7.0).to(dtype), torch.full((C + 2, R + 3), 7.0).to(dtype)
        for out in (wide[1:-1, 3 : 3 + C], wide[1:-1, 3 : 3 + 2 * C : 2], tall.T[2:-1, 1:-1], torch.empty_like(want)):
            dequantize_(out, *weight.packed, row, column)
            assert bitwise_equal(out, want), (row, column, R, C)
            out.fill_(7)
        assert (wide == 7).all(), "wrote outside"
        assert (tall == 7).all(), "wrote outside"
