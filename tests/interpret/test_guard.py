"""Each check of the guard on a kernel that is wrong in just that way, and on one beside it that is right."""

import pytest
import torch
import triton
import triton.language as tl
from guard import Violation, installed, programs_backwards
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

bf16 = torch.bfloat16


def violation(kind, lanes, program, problem, launch):
    with pytest.raises(Violation, match=problem) as caught:
        launch()
    assert (caught.value.kind, caught.value.lanes, caught.value.program) == (kind, lanes, program)


# Bounds


@triton.jit
def double(x, y, n, stride, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * stride, mask=(i < n) | (not MASK_LOAD), other=0)
    tl.store(y + i, 2 * value, mask=(i < n) | (not MASK_STORE))


def test_clean():
    x, y = torch.randn(100), torch.empty(100)
    double[(2,)](x, y, 100, 1, BLOCK=64, MASK_LOAD=True, MASK_STORE=True)
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("kind", ("load", "store"))
def test_out_of_bounds(kind):
    # One storage: what follows x and y is memory of theirs, which the arguments do not span.
    x, y = torch.zeros(2, 256)[:, :100]
    masks = {"MASK_LOAD": kind != "load", "MASK_STORE": kind != "store"}
    violation(kind, 28, (1, 0, 0), "outside", lambda: double[(2,)](x, y, 100, 1, BLOCK=64, **masks))


def test_before_the_first_element():
    x, y = torch.zeros(8)[4:], torch.empty(4)
    launch = lambda: double[(1,)](x, y, 4, -1, BLOCK=4, MASK_LOAD=True, MASK_STORE=True)  # noqa: E731
    violation("load", 3, (0, 0, 0), "outside", launch)


def test_gaps_of_a_view():
    x, y = torch.randn(8, 2), torch.empty(8)
    masks = {"MASK_LOAD": True, "MASK_STORE": True}
    double[(1,)](x[:, 0], y, 8, 2, BLOCK=8, **masks)
    assert torch.equal(y, 2 * x[:, 0])
    violation("load", 4, (0, 0, 0), "outside", lambda: double[(1,)](x[:, 0], y, 8, 1, BLOCK=8, **masks))


def test_expanded_view():
    x, y = torch.randn(1).expand(8), torch.empty(8)
    double[(1,)](x, y, 8, 0, BLOCK=8, MASK_LOAD=True, MASK_STORE=True)
    assert torch.equal(y, 2 * x)


def test_views_of_one_storage():
    x, y = torch.randn(8, 2).unbind(1)  # their spans overlap, their elements do not
    add_tuple[(1,)]((x, (y,)), z := torch.empty(8), 2, BLOCK=8)
    assert torch.equal(z, x + y)


@triton.jit
def add_tuple(inputs, out, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, (y,) = inputs[0], inputs[1]
    tl.store(out + i, tl.load(x + i * stride) + tl.load(y + i * stride))


def test_tuple_arguments():
    x, y, z = torch.randn(3, 8).unbind()
    add_tuple[(1,)]((x, (y,)), z, 1, BLOCK=8)
    assert torch.equal(z, x + y)
    y = torch.randn(16)[:6]
    violation("load", 2, (0, 0, 0), "outside", lambda: add_tuple[(1,)]((x, (y,)), z, 1, BLOCK=8))


@triton.jit
def load_described(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.sum(x.load([0, 0]), 0))


def test_tensor_descriptor():
    x, y = torch.ones(3, 8), torch.empty(8)
    load_described[(1,)](TensorDescriptor.from_tensor(x, [4, 8]), y, BLOCK=8)
    assert torch.equal(y, torch.full((8,), 3.0))


@triton.jit
def words(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x.to(tl.pointer_type(tl.int32)) + i))


def test_bytes_read_as_words():
    x, y = torch.arange(32, dtype=torch.uint8), torch.empty(8, dtype=torch.int32)
    words[(1,)](x, y, BLOCK=8)
    assert torch.equal(y, x.view(torch.int32))
    x = torch.arange(64, dtype=torch.uint8)[:30]  # the last word lies half inside
    violation("load", 1, (0, 0, 0), "outside", lambda: words[(1,)](x, y, BLOCK=8))


@pytest.mark.parametrize("shape", ((0,), (0, 8), (8, 0)))
def test_empty_tensor(shape):
    x, y, z = torch.randn(3, 8).unbind()
    add_tuple[(1,)]((x, (y,), torch.empty(shape)), z, 1, BLOCK=8)
    assert torch.equal(z, x + y)


@triton.jit
def count(counters, at, tickets, CAS: tl.constexpr):
    p = tl.program_id(0)
    ticket = tl.atomic_cas(counters + at, p, p + 1) if CAS else tl.atomic_add(counters + at, 1)
    tl.store(tickets + p, ticket)


@pytest.mark.parametrize("cas", (False, True))
def test_atomics(cas):
    counter, tickets = torch.zeros(2, dtype=torch.int32)[:1], torch.empty(4, dtype=torch.int32)
    count[(4,)](counter, 0, tickets, CAS=cas)
    assert (counter.item(), tickets.tolist()) == (4, [0, 1, 2, 3])
    violation("atomic", 1, (0, 0, 0), "outside", lambda: count[(4,)](counter, 1, tickets, CAS=cas))


# Races


@triton.jit
def touch(x, first, then, FIRST: tl.constexpr, THEN: tl.constexpr):
    """Program 0 does FIRST to one element, program 1 THEN to another."""
    p = tl.program_id(0)
    if p == 0:
        access(x + first, FIRST)
    else:
        access(x + then, THEN)


@triton.jit
def access(pointer, KIND: tl.constexpr):
    if KIND == "load":
        tl.load(pointer)
    elif KIND == "store":
        tl.store(pointer, 1.0)
    elif KIND == "atomic":
        tl.atomic_add(pointer, 1.0)
    else:
        tl.atomic_cas(pointer, 0.0, 1.0)


KINDS = ("load", "store", "atomic", "cas")


@pytest.mark.parametrize("then", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_two_programs(first, then):
    x = torch.zeros(2)
    touch[(2,)](x, 0, 1, FIRST=first, THEN=then)
    touch[(1,)](x, 1, 0, FIRST=then, THEN=first)  # another launch
    names = {"cas": "atomic"}
    kinds = {names.get(first, first), names.get(then, then)}
    if kinds == {"load"} or kinds == {"atomic"}:
        touch[(2,)](x, 0, 0, FIRST=first, THEN=then)
        return
    first, then = names.get(first, first), then
    problem = f"race with another program's {first}"
    violation(names.get(then, then), 1, (1, 0, 0), problem, lambda: touch[(2,)](x, 0, 0, FIRST=first, THEN=then))


@triton.jit
def all_read_the_last_writes(x):
    tl.load(x)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x, 1.0)


def test_one_of_many_readers_writes():
    all_read_the_last_writes[(1,)](torch.zeros(1))
    problem = "race with another program's load"
    violation("store", 1, (3, 0, 0), problem, lambda: all_read_the_last_writes[(4,)](torch.zeros(1)))


@triton.jit
def accumulate(x, out, STEPS: tl.constexpr):
    p = tl.program_id(0)
    tl.store(out + p, 0.0)
    for _ in range(STEPS):
        tl.store(out + p, tl.load(out + p) + tl.load(x))


def test_own_bytes_may_be_read_back():
    x, y = torch.ones(1), torch.empty(4)
    accumulate[(4,)](x, y, STEPS=3)
    assert torch.equal(y, torch.full((4,), 3.0))


@triton.jit
def scatter(x, out, DISTINCT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i % DISTINCT, tl.load(x + i))


def test_two_lanes():
    scatter[(1,)](torch.ones(8), torch.empty(8), DISTINCT=4, BLOCK=8)  # the same value: no matter who is last
    scatter[(1,)](torch.full((8,), torch.nan), torch.empty(8), DISTINCT=4, BLOCK=8)
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 5.0, 5.0])
    launch = lambda: scatter[(1,)](x, torch.empty(8), DISTINCT=4, BLOCK=8)  # noqa: E731
    violation("store", 2, (0, 0, 0), "another value", launch)


def test_backwards():
    counter, tickets = torch.zeros(1, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    with programs_backwards():
        count[(4,)](counter, 0, tickets, CAS=False)
    assert tickets.tolist() == [3, 2, 1, 0]
    count[(4,)](counter.zero_(), 0, tickets, CAS=False)
    assert tickets.tolist() == [0, 1, 2, 3]


# bf16

SPECIAL = (0.0, -0.0, 1.0, 1.0078125, 2.0**-8, -3.0, 3e38, -3e38, 1e-40, torch.inf, -torch.inf, torch.nan)


def numbers(dtype):
    """Random ones, ties, the largest, subnormals, infinities, NaN; and each special one against each."""
    special = torch.tensor(SPECIAL)
    pairs = torch.cartesian_prod(special, special)
    x = torch.cat([torch.randn(512 - len(pairs)), pairs[:, 0]])
    y = torch.cat([torch.randn(512 - len(pairs)), pairs[:, 1]])
    return x.to(dtype), y.to(dtype)


def same(a, b):
    """To the bit, but for the bits of NaN."""
    assert a.dtype == b.dtype
    nan = a.isnan() & b.isnan()
    bits = torch.int16 if a.dtype.itemsize == 2 else torch.int32
    assert torch.equal(a.masked_fill(nan, 0).view(bits), b.masked_fill(nan, 0).view(bits))


@triton.jit
def binary(x, y, out, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, OP(tl.load(x + i), tl.load(y + i)))


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def subtract(x, y):
    return x - y


@triton.jit
def multiply(x, y):
    return x * y


@triton.jit
def divide(x, y):
    return x / y


@triton.jit
def larger(x, y):
    return tl.where(x > y, x, y)


@triton.jit
def fused(x, y):
    return tl.fma(x, y, y)


@triton.jit
def negated(x, y):
    return -tl.abs(x) - 1.0  # -0.0 is 0.0 - 0.0 in Triton 3.6


@triton.jit
def scaled(x, y):
    return x * 1.5 + tl.full(y.shape, 0.75, tl.bfloat16)


@triton.jit
def clamped(x, y):
    return tl.clamp(x, -0.5, 0.5, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def positive(x, y):
    return (x > 0.0).to(tl.bfloat16)


@triton.jit
def mixed(x, y):
    return x + y.to(tl.float32)


OPS = {
    add: lambda x, y: x + y,
    subtract: lambda x, y: x - y,
    multiply: lambda x, y: x * y,
    divide: lambda x, y: x / y,
    larger: lambda x, y: torch.where(x > y, x, y),
    fused: lambda x, y: (x.double() * y.double() + y.double()).float().to(bf16),
    negated: lambda x, y: -x.abs() - 1,
    scaled: lambda x, y: x * 1.5 + 0.75,
    clamped: lambda x, y: x.clamp(-0.5, 0.5),
    positive: lambda x, y: (x > 0).to(bf16),
    mixed: lambda x, y: x.float() + y.float(),
}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_bf16_operator(op):
    x, y = numbers(bf16)
    expected = OPS[op](x, y)
    out = torch.empty_like(expected)
    binary[(1,)](x, y, out, OP=op, BLOCK=512)
    same(out, expected)


@triton.jit
def copy(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@pytest.mark.parametrize("source, target", [(torch.float32, bf16), (torch.float16, bf16), (torch.float64, bf16),
                                            (bf16, torch.float32), (bf16, torch.float16)])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_bf16_cast(source, target):
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF], dtype=torch.int32)
    x = torch.cat([ties.view(torch.float32), numbers(torch.float32)[0]])[:512].to(source)
    out = torch.empty(512, dtype=target)
    copy[(1,)](x, out, BLOCK=512)
    same(out, x.to(target))


def test_bf16_of_integers():
    x, out = torch.arange(-256, 256) * 77, torch.empty(512, dtype=bf16)
    copy[(1,)](x, out, BLOCK=512)
    same(out, x.to(bf16))
    back = torch.empty(512, dtype=torch.int32)
    copy[(1,)](out, back, BLOCK=512)
    assert torch.equal(back, out.to(torch.int32))


@triton.jit
def product(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tile = i[:, None] * BLOCK + i[None, :]
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.load(b + tile), tl.full((BLOCK, BLOCK), 0.125, tl.float32)))


def test_bf16_dot():
    a, b = torch.randint(-64, 64, (2, 16, 16)).div(8).to(bf16).unbind()  # exact in fp32, and not in bf16
    out = torch.empty(16, 16)
    product[(1,)](a, b, out, BLOCK=16)
    same(out, a.float() @ b.float() + 0.125)


@triton.jit
def reduced(x, total, largest, at, running, powers, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.arange(0, ROWS)
    tile = i[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = tl.load(x + tile)
    tl.store(total + i, tl.sum(values, 1))
    tl.store(total + ROWS, tl.sum(values))
    largest_value, largest_at = tl.max(values, 1, return_indices=True)
    tl.store(largest + i, largest_value)
    tl.store(at + i, largest_at)
    tl.store(running + tile, tl.cumsum(values, 1))
    tl.store(powers + tile, tl.cumprod(values, 1))


def test_bf16_reductions():
    x = torch.stack([torch.randperm(128)[:16] - 64 for _ in range(4)]).to(bf16)
    total, largest, at = torch.empty(5, dtype=bf16), torch.empty(4, dtype=bf16), torch.empty(4, dtype=torch.int32)
    running, powers = torch.empty(2, 4, 16, dtype=bf16).unbind()
    reduced[(1,)](x, total, largest, at, running, powers, ROWS=4, COLUMNS=16)
    exact = x.double()
    same(total, torch.cat([exact.sum(1), exact.sum()[None]]).to(bf16))
    same(largest, x.amax(1))
    assert torch.equal(at.long(), x.argmax(1))
    same(running, exact.cumsum(1).to(bf16))
    torch.testing.assert_close(powers, exact.cumprod(1).to(bf16), rtol=2**-7, atol=0)  # fp32 rounds it too


def test_everything_is_put_back():
    def patched():
        return {name: vars(owner)[name] for owner in (InterpreterBuilder, GridExecutor) for name in vars(owner)}

    before = patched()
    with installed(), programs_backwards():
        assert patched() != before
    assert patched() == before
