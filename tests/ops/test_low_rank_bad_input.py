"""Bad input: the right exception, naming the argument, before anything is written, on every route a call can take."""

import re

import pytest
import torch

import lora_kernels as lk
from lora_kernels.testing import bitwise_equal

M, K, N, R, L = 6, 32, 24, 4, 3
IDS = torch.tensor([0, 2, -1, 1, 1, 0])
INDPTR, SEGMENTS = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 0, 2])


def good():
    """The arguments every function draws from; made afresh for each case."""
    g = torch.Generator().manual_seed(0)
    return {
        "y": torch.randn(M, N, generator=g),
        "x": torch.randn(M, K, generator=g),
        "A": torch.randn(L, R, K, generator=g),
        "B": torch.randn(L, N, R, generator=g),
        "v": torch.randn(1, M, R, generator=g),
        "adapter_ids": IDS.clone(),
        "seg_indptr": INDPTR.clone(),
        "weight": torch.randn(N, K, generator=g),
    }


FUNCTIONS = {
    "bgmv": (lk.bgmv, ("y", "x", "A", "B", "adapter_ids")),
    "sgmv": (lk.sgmv, ("y", "x", "A", "B", "seg_indptr", "adapter_ids")),
    "bgmv_shrink": (lk.bgmv_shrink, ("x", "A", "adapter_ids")),
    "sgmv_shrink": (lk.sgmv_shrink, ("x", "A", "seg_indptr", "adapter_ids")),
    "bgmv_expand": (lk.bgmv_expand, ("y", "v", "B", "adapter_ids")),
    "sgmv_expand": (lk.sgmv_expand, ("y", "v", "B", "seg_indptr", "adapter_ids")),
    "multi_lora": (lk.multi_lora, ("x", "A", "B", "adapter_ids")),
    "lora_linear": (lk.lora_linear, ("x", "weight", "A", "B")),
}


def arguments(function, **changes):
    """(positional arguments, keywords) of a good call of a function with some changed."""
    names = FUNCTIONS[function][1]
    values = good()
    if function.startswith("sgmv"):
        values["adapter_ids"] = SEGMENTS.clone()
    if function == "lora_linear":
        values["A"], values["B"] = values["A"][0], values["B"][0]
    values |= {name: changes.pop(name) for name in list(changes) if name in names}
    return [values[name] for name in names], changes


def refused(function, error, message, **changes):
    """The call raises, and y (whichever way it comes) keeps its bits."""
    positional, keywords = arguments(function, **changes)
    names = FUNCTIONS[function][1]
    y = positional[names.index("y")] if "y" in names else keywords.get("y")
    before = y.clone() if isinstance(y, torch.Tensor) and y.device.type == "cpu" else None
    with pytest.raises(error, match=message):
        FUNCTIONS[function][0](*positional, **keywords)
    if before is not None:
        assert bitwise_equal(y, before), "y was written before the call was refused"


ADD = ("bgmv", "sgmv", "multi_lora")
SHRINK = (*ADD, "bgmv_shrink", "sgmv_shrink")
EXPAND = ("bgmv_expand", "sgmv_expand")
BY_ROW = ("bgmv", "bgmv_shrink", "bgmv_expand", "multi_lora")
BY_SEGMENT = ("sgmv", "sgmv_shrink", "sgmv_expand")
HAS_Y = ("bgmv", "sgmv", "bgmv_expand", "sgmv_expand", "multi_lora")
ALL = (*SHRINK, *EXPAND)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_good_call_is_good(function, route):
    """What the cases below change is all that is wrong with them."""
    positional, keywords = arguments(function)
    assert FUNCTIONS[function][0](*positional, **keywords).isfinite().all()


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# (functions, exception, message, changed arguments)
CASES = {
    "x: not a tensor": (SHRINK, TypeError, "x must be a tensor, got list", {"x": [[1.0] * K] * M}),
    "x: integers": (SHRINK, TypeError, "x must be float32.*int64", {"x": zeros(M, K, dtype=torch.int64)}),
    "x: a scalar": (SHRINK, ValueError, "x must be", {"x": torch.tensor(1.0)}),
    "x: on meta": (SHRINK, ValueError, "(?s)(x|A|y).*on.*meta", {"x": meta(M, K)}),
    "x: wrong K": (SHRINK, ValueError, r"A must be \[3, 4, 33\]", {"x": zeros(M, K + 1)}),
    "x: other rows": (BY_ROW[:2], ValueError, "adapter_ids has 6 entries, x has 5 rows", {"x": zeros(M - 1, K)}),
    "A: not a tensor": (SHRINK, TypeError, "A must be.*got int", {"A": 3}),
    "A: a list of numbers": (SHRINK, TypeError, r"A\[0\] must be a tensor, got float", {"A": [1.0, 2.0]}),
    "A: none": (SHRINK, TypeError, "A must be.*got NoneType", {"A": None}),
    "A: an empty list": (SHRINK, ValueError, "A must be", {"A": []}),
    "A: a vector": (SHRINK, ValueError, r"A must be.*got \[32\]", {"A": zeros(K)}),
    "A: integers": (SHRINK, TypeError, "A must be float32", {"A": zeros(L, R, K, dtype=torch.int32)}),
    "A: half under fp32": (ADD, TypeError, "(A|B) must be", {"A": zeros(L, R, K, dtype=torch.float16)}),
    "A and B: half under fp32": (
        ADD, TypeError, "A must be",
        {"A": zeros(L, R, K, dtype=torch.bfloat16), "B": zeros(L, N, R, dtype=torch.bfloat16)},
    ),
    "A and B: fp16 under bf16": (
        ADD, TypeError, "A must be torch.bfloat16",
        {
            "x": zeros(M, K, dtype=torch.bfloat16), "A": zeros(L, R, K, dtype=torch.float16),
            "B": zeros(L, N, R, dtype=torch.float16),
        },
    ),
    "A: wrong K": (SHRINK, ValueError, r"A must be \[3, 4, 32\].*got \[3, 4, 31\]", {"A": zeros(L, R, K - 1)}),
    "A: on meta": (SHRINK, ValueError, "A is on meta", {"A": meta(L, R, K)}),
    "A: mixed forms": (SHRINK, ValueError, r"A\[1\] must be", {"A": [zeros(L, R, K), zeros(R, K)]}),
    "A: mixed dtypes": (SHRINK, TypeError, r"A\[1\]", {"A": [zeros(L, R, K), zeros(L, R, K, dtype=torch.bfloat16)]}),
    "A: rank of 513": (SHRINK, ValueError, "A has rank 513, more than the 512", {"A": zeros(L, 513, K)}),
    "B: not a tensor": (ADD, TypeError, "B must be", {"B": "B"}),
    "B: an empty list": ((*ADD, *EXPAND), ValueError, "B must be", {"B": []}),
    "B: wrong R": (ADD, ValueError, r"B must be \[3, N, 4\].*got \[3, 24, 5\]", {"B": zeros(L, N, R + 1)}),
    "B: wrong L": (ADD, ValueError, r"B must be \[3, N, 4\].*got \[2, 24, 4\]", {"B": zeros(L - 1, N, R)}),
    "B: other dtype than A": (ADD, TypeError, "B must be", {"B": zeros(L, N, R, dtype=torch.bfloat16)}),
    "B: another form than A": (ADD, ValueError, "B", {"B": [zeros(N, R)] * L}),
    "B: more slices than A": (ADD, ValueError, "A must be", {"B": (zeros(L, N // 2, R),) * 2}),
    "B: on meta": ((*ADD, *EXPAND), ValueError, "B is on meta", {"B": meta(L, N, R)}),
    "B: rank of 513": (
        EXPAND, ValueError, "B has rank 513, more than the 512", {"B": zeros(L, N, 513), "v": zeros(1, M, 513)}
    ),
    "v: not a tensor": (EXPAND, TypeError, "v must be a tensor", {"v": None}),
    "v: half": (EXPAND, TypeError, "v must be float32", {"v": zeros(1, M, R, dtype=torch.float16)}),
    "v: two slices": (EXPAND, ValueError, r"v must be \[1, M, 4\]", {"v": zeros(2, M, R)}),
    "v: wrong R": (EXPAND, ValueError, r"v must be \[1, M, 4\].*got \[1, 6, 5\]", {"v": zeros(1, M, R + 1)}),
    "B: a list of several N": (
        EXPAND, ValueError, r"B\[1\] must be \[24, r\] as B\[0\], got \[25, 4\]",
        {"v": zeros(1, M, 4), "B": [zeros(24, 4), zeros(25, 4), zeros(24, 4)]},
    ),
    "v: other rows": (("bgmv_expand",), ValueError, "adapter_ids has 6 entries", {"v": zeros(1, M - 1, R)}),
    "v: a matrix": (EXPAND, ValueError, "v must be", {"v": zeros(M, R)}),
    "y: not a tensor": (HAS_Y, TypeError, "y must be a tensor, got list", {"y": [0.0]}),
    "y: integers": (HAS_Y, TypeError, "y must be float32", {"y": zeros(M, N, dtype=torch.int32)}),
    "y: half under fp32 x": (ADD, TypeError, "y must be float32", {"y": zeros(M, N, dtype=torch.bfloat16)}),
    "y: wrong N": (HAS_Y, ValueError, r"y must be \[..., 24\].*got \[6, 25\]", {"y": zeros(M, N + 1)}),
    "y: other rows": (HAS_Y, ValueError, r"y \[5, 24\] must have 6 rows", {"y": zeros(M - 1, N)}),
    "y: a scalar": (HAS_Y, ValueError, "y must be", {"y": torch.tensor(0.0)}),
    "y: expanded": (HAS_Y[:4], ValueError, "y.*expanded", {"y": zeros(1, N).expand(M, N)}),
    "y: on meta": (HAS_Y, ValueError, "(?s)y.*on meta|on meta.*y|(x|v|B) (is )?on", {"y": meta(M, N)}),
    "ids: not a tensor": (ALL, TypeError, "adapter_ids must be a tensor.*got list", {"adapter_ids": [0] * M}),
    "ids: none": (BY_ROW, TypeError, "adapter_ids must be a tensor.*got NoneType", {"adapter_ids": None}),
    "ids: floats": (ALL, TypeError, "adapter_ids must be int32 or int64, got torch.float32", {"adapter_ids": zeros(M)}),
    "ids: int16": (ALL, TypeError, "adapter_ids must be int32 or int64", {"adapter_ids": zeros(M, dtype=torch.int16)}),
    "ids: too few": (BY_ROW, ValueError, "adapter_ids has 5 entries", {"adapter_ids": IDS[:5]}),
    "ids: a scalar": (BY_ROW, ValueError, "adapter_ids must be", {"adapter_ids": torch.tensor(0)}),
    "ids: on meta": (ALL, ValueError, "adapter_ids", {"adapter_ids": meta(M, dtype=torch.int64)}),
    "ids: L": (BY_ROW, IndexError, r"adapter_ids\[3\] is 3", {"adapter_ids": torch.tensor([0, 2, -1, 3, 9, 0])}),
    "ids: -2": (BY_ROW, IndexError, r"adapter_ids\[4\] is -2", {"adapter_ids": int32(0, 2, -1, 1, -2, 7)}),
    "ids: huge": (BY_ROW, IndexError, r"adapter_ids\[0\]", {"adapter_ids": IDS + 2**32}),
    "ids: a mixture without weights": (
        BY_ROW, ValueError, "weights", {"adapter_ids": IDS[:, None].repeat(1, 2)}
    ),
    "segment ids: L": (BY_SEGMENT, IndexError, r"adapter_ids\[1\] is 3", {"adapter_ids": torch.tensor([0, 3, 5])}),
    "segment ids: -2": (BY_SEGMENT, IndexError, r"adapter_ids\[2\] is -2", {"adapter_ids": torch.tensor([0, 2, -2])}),
    "segment ids: other dtype": (BY_SEGMENT, TypeError, "seg_indptr.*adapter_ids", {"adapter_ids": SEGMENTS.int()}),
    "segment ids: too many": (BY_SEGMENT, ValueError, r"seg_indptr must be \[n_seg \+ 1\]", {"adapter_ids": IDS[:4]}),
    "segments: not a tensor": (BY_SEGMENT, TypeError, "seg_indptr must be a tensor", {"seg_indptr": [0, 2, 2, 5]}),
    "segments: floats": (BY_SEGMENT, TypeError, "seg_indptr must be int32 or int64", {"seg_indptr": INDPTR.float()}),
    "segments: not from 0": (BY_SEGMENT, ValueError, "seg_indptr must start at 0, got 1", {"seg_indptr": INDPTR + 1}),
    "segments: falling": (
        BY_SEGMENT, ValueError, "seg_indptr must not fall, got 3 then 2 at 1",
        {"seg_indptr": torch.tensor([0, 3, 2, 5])},
    ),
    "segments: past the rows": (
        BY_SEGMENT, ValueError, "seg_indptr ends at row 7", {"seg_indptr": torch.tensor([0, 2, 2, 7])}
    ),
    "segments: a plan and ids": (
        BY_SEGMENT, ValueError, "pass no adapter_ids", {"seg_indptr": lk.BatchPlan.from_ids(IDS, L)}
    ),
    "segments: no ids": (BY_SEGMENT, TypeError, "adapter_ids must be a tensor", {"adapter_ids": None}),
    "plan: of more rows": (
        BY_ROW, ValueError, "plan is of 12 rows, x has 6", {"adapter_ids": lk.BatchPlan.from_ids(IDS.repeat(2), L)}
    ),
    "plan: of more adapters": (
        BY_ROW, ValueError, "plan is of 5 adapters.* 3", {"adapter_ids": lk.BatchPlan.from_ids(IDS, 5)}
    ),
    "plan: of fewer adapters": (
        BY_ROW, ValueError, "plan is of 2 adapters.* 3", {"adapter_ids": lk.BatchPlan.from_ids(IDS.clamp(max=1), 2)}
    ),
    "ranks: not a tensor": (ALL, TypeError, "ranks must be a tensor", {"ranks": [4, 4, 4]}),
    "ranks: int64": (ALL, TypeError, "ranks must be int32", {"ranks": torch.tensor([4, 4, 4])}),
    "ranks: too few": (ALL, ValueError, "ranks must be", {"ranks": int32(4, 4)}),
    "ranks: too many slices": (ALL, ValueError, "ranks must be", {"ranks": int32(4, 4, 4).expand(2, 3)}),
    "ranks: past R": (ALL, ValueError, r"ranks must lie in 0..4, got 5", {"ranks": int32(4, 5, 1)}),
    "ranks: negative": (ALL, ValueError, r"ranks must lie in 0..4, got -1", {"ranks": int32(4, 2, -1)}),
    "ranks: on meta": (ALL, ValueError, "ranks is on meta", {"ranks": meta(L, dtype=torch.int32)}),
    "scaling: a string": (HAS_Y, TypeError, "scaling must be", {"scaling": "2"}),
    "scaling: a list": (HAS_Y, TypeError, "scaling must be", {"scaling": [1.0, 1.0, 1.0]}),
    "scaling: half": (HAS_Y, TypeError, "scaling must be float32", {"scaling": torch.ones(L, dtype=torch.bfloat16)}),
    "scaling: fp64": (HAS_Y, TypeError, "scaling must be float32", {"scaling": torch.ones(L, dtype=torch.float64)}),
    "scaling: too few": (HAS_Y, ValueError, "scaling must be", {"scaling": torch.ones(L - 1)}),
    "scaling: a scalar tensor": (HAS_Y, ValueError, "scaling must be", {"scaling": torch.tensor(2.0)}),
    "scaling: on meta": (HAS_Y, ValueError, "scaling is on meta", {"scaling": meta(L)}),
    "weights: no mixture": (("bgmv", "multi_lora"), ValueError, "weights must be", {"weights": torch.ones(M, 2)}),
    "weights: a vector": (("bgmv", "multi_lora"), ValueError, "weights must be", {"weights": torch.ones(M)}),
    "weights: not a tensor": (("bgmv", "multi_lora"), TypeError, "weights must be a tensor", {"weights": 1.0}),
    "weights: too few": (
        ("bgmv", "multi_lora"), ValueError, "weights must be",
        {"adapter_ids": IDS[:, None].repeat(1, 2), "weights": torch.ones(M, 3)},
    ),
    "weights: half": (
        ("bgmv", "multi_lora"), TypeError, "weights must be float32",
        {"adapter_ids": IDS[:, None].repeat(1, 2), "weights": torch.ones(M, 2, dtype=torch.bfloat16)},
    ),
    "weights: ids out of range": (
        ("bgmv", "multi_lora"), IndexError, r"adapter_ids\[7\] is 4",
        {"adapter_ids": torch.tensor([[0, 1]] * 3 + [[0, 4]] * 3), "weights": torch.ones(M, 2)},
    ),
    "weights: a plan of other pairs": (
        ("bgmv", "multi_lora"), ValueError, "plan is of 6 rows.*2 adapters each",
        {"adapter_ids": lk.BatchPlan.from_ids(IDS, L), "weights": torch.ones(M, 2)},
    ),
    "weights: on meta": (
        ("bgmv", "multi_lora"), ValueError, "weights is on meta",
        {"adapter_ids": IDS[:, None].repeat(1, 2), "weights": meta(M, 2)},
    ),
    "weight: not a tensor": (("lora_linear",), TypeError, "weight must be a tensor", {"weight": None}),
    "weight: wrong K": (("lora_linear",), ValueError, r"weight must be \[N, 32\]", {"weight": zeros(N, K + 1)}),
    "weight: a vector": (("lora_linear",), ValueError, "weight must be", {"weight": zeros(K)}),
    "weight: dtype": (("lora_linear",), TypeError, "weight must be", {"weight": zeros(N, K, dtype=torch.bfloat16)}),
    "weight: on meta": (("lora_linear",), ValueError, "weight is on meta", {"weight": meta(N, K)}),
    "weight: trainable": (
        ("lora_linear",), ValueError, "weight requires grad", {"weight": zeros(N, K).requires_grad_()}
    ),
    "linear A: stacked": (("lora_linear",), ValueError, "A must be", {"A": zeros(1, R, K)}),
    "linear A: wrong K": (("lora_linear",), ValueError, "A must be", {"A": zeros(R, K - 1)}),
    "linear A: dtype": (("lora_linear",), TypeError, "A and B must both be", {"A": zeros(R, K, dtype=torch.float16)}),
    "linear A: on meta": (("lora_linear",), ValueError, "A is on meta", {"A": meta(R, K)}),
    "linear B: wrong N": (("lora_linear",), ValueError, r"B must be \[24, 4\]", {"B": zeros(N + 1, R)}),
    "linear B: wrong R": (("lora_linear",), ValueError, "B must be", {"B": zeros(N, R + 1)}),
    "linear B: none": (("lora_linear",), TypeError, "B must be a tensor", {"B": None}),
    "bias: wrong N": (("lora_linear",), ValueError, r"bias must be \[24\]", {"bias": zeros(N + 1)}),
    "bias: dtype": (("lora_linear",), TypeError, "bias must be", {"bias": zeros(N, dtype=torch.bfloat16)}),
    "bias: not a tensor": (("lora_linear",), TypeError, "bias must be a tensor", {"bias": 1.0}),
    "linear scaling: a tensor": (("lora_linear",), TypeError, "scaling must be a float", {"scaling": torch.ones(1)}),
    "linear x: integers": (("lora_linear",), TypeError, "x must be", {"x": zeros(M, K, dtype=torch.int64)}),
    "linear x: a scalar": (("lora_linear",), ValueError, "(x|weight) must be", {"x": torch.tensor(1.0)}),
}  # fmt: skip


@pytest.mark.parametrize(
    "function, case", [pytest.param(f, c, id=f"{c}-{f}") for c, (functions, *_) in CASES.items() for f in functions]
)
def test_refused(function, case, route):
    _, error, message, changes = CASES[case]
    if case == "ids: a mixture without weights" and function != "bgmv":
        message = "weights|mixture"
    refused(function, error, message, **changes)


@pytest.mark.parametrize(
    "case", [c for c, (fs, *_) in CASES.items() if "lora_linear" in fs and c != "weight: trainable"]
)
def test_lora_linear_refuses_without_gradients_too(case, route):
    """Where it leaves refusing to torch and the kernels, and gives the same reasons."""
    _, error, message, changes = CASES[case]
    with torch.no_grad():
        refused("lora_linear", error, message, **changes)


@pytest.mark.parametrize("function", ("bgmv", "sgmv", "bgmv_shrink", "sgmv_shrink", "bgmv_expand", "sgmv_expand"))
def test_in_place_functions_refuse_gradients(function, route):
    names = [name for name in FUNCTIONS[function][1] if name in ("y", "x", "A", "B", "v")]
    for name in names:
        refused(function, RuntimeError, f"{function}.*multi_lora", **{name: good()[name].requires_grad_()})
        positional, _ = arguments(function, **{name: good()[name].requires_grad_()})
        with torch.no_grad():
            FUNCTIONS[function][0](*positional)
    factors = {"A": "A", "B": "B"}
    for name in set(names) & set(factors):
        several = [t.clone().requires_grad_(i == 1) for i, t in enumerate(good()[name])]
        other = {o: list(good()[o]) for o in set(names) & set(factors) - {name}}
        refused(function, RuntimeError, "multi_lora", **{name: several}, **other)


def test_in_place_functions_refuse_weights_with_gradients(route):
    ids, weights = IDS[:, None].repeat(1, 2), torch.ones(M, 2, requires_grad=True)
    refused("bgmv", RuntimeError, "multi_lora", adapter_ids=ids, weights=weights)


def test_gradients_of_bad_input_are_refused_too(route):
    """The differentiable route checks as the plain one does, and leaves y alone."""
    for case in ("ids: L", "y: wrong N", "B: wrong R", "ranks: past R", "A: on meta", "scaling: too few"):
        _, error, message, changes = CASES[case]
        refused("multi_lora", error, message, x=good()["x"].requires_grad_(), **changes)
    for case in ("linear A: wrong K", "linear B: wrong R", "bias: wrong N", "weight: dtype"):
        _, error, message, changes = CASES[case]
        refused("lora_linear", error, message, x=good()["x"].requires_grad_(), **changes)


def test_listed_factors_must_fit(route):
    A, B = [torch.randn(r, K) for r in (4, 2, 3)], [torch.randn(N, r) for r in (4, 2, 3)]
    for f in ("bgmv", "sgmv", "multi_lora"):
        refused(f, ValueError, re.escape("B[1] must be [24, 2]"), A=A, B=[B[0], torch.randn(N, 3), B[2]])
        refused(f, ValueError, re.escape("B[2] must be [24, 3]"), A=A, B=[*B[:2], torch.randn(N + 1, 3)])
        refused(f, ValueError, re.escape("A[2] must be [r, 32]"), A=[*A[:2], torch.randn(3, K + 1)], B=B)
        refused(f, ValueError, "A and B", A=A, B=B[:2])
        refused(f, TypeError, re.escape("A[1]"), A=[A[0], A[1].half(), A[2]], B=B)
    refused("bgmv", IndexError, r"adapter_ids\[1\] is 2", A=A[:2], B=B[:2])


def test_slices_must_fit(route):
    A, B = (torch.randn(L, R, K),) * 2, (torch.randn(L, 10, R), torch.randn(L, 14, R))
    for f in ("bgmv", "sgmv", "multi_lora"):
        refused(f, ValueError, re.escape("A[1] must be [3, 4, 32]"), A=(A[0], torch.randn(L, R + 1, K)), B=B)
        refused(f, ValueError, re.escape("A[1] must be [3, 4, 32]"), A=(A[0], torch.randn(L + 1, R, K)), B=B)
        refused(f, ValueError, re.escape("B[1] must be [3, N, 4]"), A=A, B=(B[0], torch.randn(L, 14, R + 1)))
        refused(f, ValueError, "A and B", A=A, B=B[:1])
        refused(f, ValueError, "scaling", A=A, B=B, scaling=torch.ones(3, L))
        refused(f, ValueError, "y must be|y ", A=A, B=(B[0], torch.randn(L, 15, R)), y=torch.zeros(M, N))


def test_a_packed_A_must_fit(route):
    B = torch.randn(L, 10, R), torch.randn(L, 14, R)
    pool = torch.randn(L, 2 * R, K)
    ranks = torch.tensor([R, 1, 2], dtype=torch.int32)
    for f in ("bgmv", "sgmv", "multi_lora"):
        refused(f, ValueError, re.escape("A must be [3, 2 * 4, K]"), A=pool[:, 1:], B=B, ranks=ranks)
        refused(f, ValueError, re.escape("ranks must be [L] for a packed A"), A=pool, B=B, ranks=ranks.expand(2, L))
        refused(f, ValueError, "ranks must lie in 0..4", A=pool, B=B, ranks=ranks + 1)
        refused(f, ValueError, "ranks must lie in 0..4", A=pool, B=B, ranks=ranks - 2)
        refused(f, ValueError, re.escape("B[1] must be [3, N, 4]"), A=pool, B=(B[0], B[1][:2]), ranks=ranks)
        refused(f, ValueError, "A", A=pool[..., :-1], B=B, ranks=ranks)


def test_a_packed_A_may_be_higher_than_a_rank(route):
    x, y, pool = torch.randn(3, 8), torch.zeros(3, 4), torch.randn(1, 600, 8)
    B = torch.randn(1, 2, 300), torch.randn(1, 2, 300)
    ids = torch.zeros(3, dtype=torch.int64)
    got = lk.bgmv(y.clone(), x, pool, B, ids)
    torch.testing.assert_close(got, lk.bgmv(y.clone(), x, pool.split(300, 1), B, ids))
    with pytest.raises(ValueError, match="A has rank 513, more than the 512"):
        lk.bgmv(y, x, torch.randn(1, 1026, 8), (torch.randn(1, 2, 513),) * 2, ids)


def test_a_fourth_size_must_be_one(route):
    for f in ("bgmv", "sgmv", "multi_lora"):
        refused(f, ValueError, "A must have a size of 1 after L", A=torch.randn(L, 2, R, K))
        refused(f, ValueError, "B must have a size of 1 after L", A=torch.randn(L, 1, R, K), B=torch.randn(L, 3, N, R))
        refused(f, ValueError, "A must have a size of 1", A=(torch.randn(L, 2, R, K),) * 2)


PLANS = {
    "ids not a tensor": (TypeError, "adapter_ids", lambda: lk.BatchPlan.from_ids([0, 1], 2)),
    "ids float": (TypeError, "adapter_ids", lambda: lk.BatchPlan.from_ids(torch.zeros(2), 2)),
    "id too large": (IndexError, r"adapter_ids\[1\] is 2", lambda: lk.BatchPlan.from_ids(torch.tensor([0, 2]), 2)),
    "id below -1": (IndexError, r"adapter_ids\[0\] is -3", lambda: lk.BatchPlan.from_ids(torch.tensor([-3, 0]), 2)),
    "ids of three axes": (ValueError, "adapter_ids", lambda: lk.BatchPlan.from_ids(torch.zeros(1, 1, 1).long(), 2)),
    "capacity": (ValueError, "capacity", lambda: lk.BatchPlan.empty(-1, 2)),
    "capacity not an int": (ValueError, "capacity", lambda: lk.BatchPlan.empty(2.5, 2)),
    "num_adapters": (ValueError, "num_adapters", lambda: lk.BatchPlan.empty(1, -2)),
    "falling": (ValueError, "seg_indptr", lambda: lk.BatchPlan.from_segments(torch.tensor([0, 3, 1]), IDS[:2], 3)),
    "not from 0": (ValueError, "seg_indptr", lambda: lk.BatchPlan.from_segments(torch.tensor([1, 3, 4]), IDS[:2], 3)),
    "segment id": (IndexError, "adapter_ids", lambda: lk.BatchPlan.from_segments(torch.tensor([0, 3, 4]), IDS[:2], 1)),
    "segment count": (ValueError, "seg_indptr", lambda: lk.BatchPlan.from_segments(torch.tensor([0, 3]), IDS[:2], 3)),
    "no segments": (ValueError, "seg_indptr", lambda: lk.BatchPlan.from_segments(IDS[:0], IDS[:0], 3)),
    "order twice": (ValueError, "order must hold each", lambda: lk.BatchPlan.from_ids(IDS, L, order=IDS.clamp(0))),
    "order past the end": (
        ValueError, "order must hold each", lambda: lk.BatchPlan.from_ids(IDS, L, order=torch.arange(M) + 1)
    ),
    "order too short": (ValueError, "order must be", lambda: lk.BatchPlan.from_ids(IDS, L, order=torch.arange(M - 1))),
    "order float": (TypeError, "order must be", lambda: lk.BatchPlan.from_ids(IDS, L, order=torch.arange(M) * 1.0)),
    "order not a tensor": (TypeError, "order must be", lambda: lk.BatchPlan.from_ids(IDS, L, order=list(range(M)))),
    "order elsewhere": (ValueError, "order is on meta", lambda: lk.BatchPlan.from_ids(IDS, L, order=meta(M).long())),
    "order of other segments": (
        ValueError, "seg_indptr ends", lambda: lk.BatchPlan.from_segments(INDPTR, SEGMENTS, L, order=torch.arange(2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_plan_refused(case, route):
    error, message, build = PLANS[case]
    with pytest.raises(error, match=message):
        build()


def test_a_refused_update_leaves_the_plan(route):
    plan = lk.BatchPlan.from_ids(IDS, L)
    before = plan.table.clone()
    for ids, error, message in (
        (torch.tensor([0, 3]), IndexError, r"adapter_ids\[1\] is 3"),
        (torch.tensor([-2]), IndexError, r"adapter_ids\[0\] is -2"),
        (IDS.repeat(2), ValueError, "room for 6"),
        (IDS.float(), TypeError, "adapter_ids"),
        (meta(M, dtype=torch.int64), ValueError, "adapter_ids"),
    ):
        with pytest.raises(error, match=message):
            plan.update_(ids)
        assert bitwise_equal(plan.table, before)
    for changes, error, message in (
        ({"order": torch.zeros(M).long()}, ValueError, "order must hold each"),
        ({"seg_indptr": torch.tensor([0, 9])}, ValueError, "seg_indptr"),
    ):
        with pytest.raises(error, match=message):
            plan.update_(IDS, **changes)
        assert bitwise_equal(plan.table, before)
        assert plan.num_pairs == M
