"""Patched LoRA over GPTQ and AWQ: PEFT's own layers over stand-ins with the tensors and the forward of GPTQModel's."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from nets import close, config
from packed_bases import kernels, slope
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from seeded import BESIDE, Pair

import lora_kernels as lk
from lora_kernels.integrations.peft import FAST
from lora_kernels.testing import assert_within_rule

pytestmark = pytest.mark.filterwarnings("ignore")

K, N, GROUP = 64, 32, 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture(autouse=True)
def a_kernel():
    with kernels():
        yield


def words(numbers, order=tuple(range(8))):
    """Eight numbers of 4 bits along the last axis in an int32, lowest first."""
    eights = numbers.long().unflatten(-1, (-1, 8))[..., list(order)]
    packed = (eights << 4 * torch.arange(8)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


class Quantised(nn.Module):
    """What GPTQModel's layers in torch have that PEFT and the kernels read."""

    bits = 4
    adapter = None

    def __init__(self, act_order=False, zeros=1):
        super().__init__()
        self.in_features, self.out_features, self.zeros = K, N, zeros
        of = torch.randperm(K) // GROUP if act_order else torch.arange(K) // GROUP
        q, z = torch.randint(16, (K, N)), torch.randint(1, 16, (K // GROUP, N))
        scales = (torch.rand(K // GROUP, N) + 0.5).half() / 40
        self.weight64 = (scales.double()[of] * (q - z[of])).T
        self.pack(q, z, of)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.randn(N).half())

    def qzero_format(self):
        return self.zeros

    def forward(self, x):
        return nn.functional.linear(x, self.weight64.to(x.dtype), self.bias.to(x.dtype))


class Gptq(Quantised):
    QUANT_TYPE = "torch"

    def pack(self, q, z, of):
        self.register_buffer("qweight", words(q.T).T.contiguous())
        self.register_buffer("qzeros", words(z - int(self.zeros == 1)))
        self.register_buffer("g_idx", of.int())


class Awq(Quantised):
    QUANT_TYPE = "awq_torch"

    def pack(self, q, z, of):
        self.register_buffer("qweight", words(q, AWQ_ORDER))
        self.register_buffer("qzeros", words(z, AWQ_ORDER))


class Marlin(Gptq):
    """Whose tensors are in another order, which only its name tells."""

    QUANT_TYPE = "marlin"


MAKES = {
    "gptq": lambda: (GPTQLoraLinear, Gptq()),
    "gptq_v2, act-order": lambda: (GPTQLoraLinear, Gptq(True, zeros=2)),
    "awq": lambda: (AwqLoraLinear, Awq()),
}


def layer(make, **kwargs):
    torch.manual_seed(4)
    cls, base = make()
    settings = config(**kwargs)
    model = nn.Module()
    model.up = cls(base, "default", config=settings, r=4, lora_alpha=6)
    return model.train()


def run(x):
    def run(m):
        inner = x.clone().requires_grad_()
        y = m.up(inner)
        A, B = m.up.lora_A.default.weight, m.up.lora_B.default.weight
        return [y.detach(), *torch.autograd.grad(y, (inner, A, B), slope(x, N).to(y.dtype))]

    return run


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("make", MAKES)
def test_no_less_exact_than_peft(calls, make, dtype):
    pair = Pair(layer(MAKES[make]))
    x = torch.randn(120, K).to(dtype)
    base, A, B = pair.model.up.base_layer, pair.model.up.lora_A.default.weight, pair.model.up.lora_B.default.weight
    inner, A, B = (t.detach().double().requires_grad_() for t in (x, A, B))
    y = inner @ base.weight64.T + base.bias.double() + 1.5 * (inner @ A.T) @ B.T
    exact = [y.detach(), *torch.autograd.grad(y, (inner, A, B), slope(x, N).double())]
    plain, results = (run(x)(m) for m in pair)
    for what, got, want, theirs in zip(("y", "dx", "dA", "dB"), results, exact, plain, strict=True):
        assert got.dtype == theirs.dtype
        noise = 0.0 if got.dtype is dtype else 120**0.5 * 2**-24 * float(want.norm())
        assert_within_rule(got, want, theirs, noise=noise, what=what)
    assert calls.take() == (1, 0)
    assert pair.handle.report().layers == {"up": FAST}


@pytest.mark.parametrize("kwargs", ({}, dict(lora_dropout=0.3), dict(lora_bias=True)))
@pytest.mark.parametrize("make", ("gptq", "gptq_v2, act-order"))
def test_lifecycle(calls, make, kwargs):
    pair = Pair(layer(MAKES[make], **kwargs))
    x = torch.randn(20, K)
    before = {name: t.clone() for name, t in pair.model.state_dict().items()}
    pair.same(calls, run(x))
    pair.do(lambda m: m.eval())
    pair.same(calls, lambda m: m.up(x).detach())
    pair.do(lambda m: m.up.enable_adapters(False))
    close(*(m.up(x) for m in pair))
    assert pair.handle.report().layers == {"up": "base layer only: adapters disabled"}
    copied, pickled = copy.deepcopy(pair.model), pickle.loads(pickle.dumps(pair.model))
    close(copied.up(x), pickled.up(x))
    pair.handle.unpatch()
    assert type(pair.model.up) is type(pair.twin.up)
    assert all(torch.equal(t, before[name]) for name, t in pair.model.state_dict().items())
    assert list(before) == list(pair.twin.state_dict())


def test_zeros_are_read_as_the_layer_says(calls):
    """A layer whose zeros GPTQModel turned from one format to the other since the last call."""
    pair = Pair(layer(MAKES["gptq"]))
    x = torch.randn(20, K)
    before = pair.same(calls, run(x))
    base = pair.model.up.base_layer
    base.qzeros += 0x11111111
    base.zeros = 2
    assert all(map(torch.equal, pair.same(calls, run(x)), before))


def test_other_layouts_run_by_themselves(calls):
    pair = Pair(layer(lambda: (GPTQLoraLinear, Marlin())))
    pair.same(calls, run(torch.randn(20, K)), BESIDE)
    with_own = layer(MAKES["gptq"])
    with_own.up.base_layer.adapter = object()
    reason = "base layer has an adapter of its own"
    assert lk.patch(with_own).report().layers == {"up": f"{BESIDE}: {reason}"}
