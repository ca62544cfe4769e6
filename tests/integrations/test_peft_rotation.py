"""Patched BOFT layers against PEFT's own."""

import copy
import os
import pickle
import warnings

import pytest
import torch
from nets import K, Net
from peft import BOFTConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.integrations import _peft_rotation
from lora_kernels.testing import assert_within_rule

FAST = "fast"


@pytest.fixture(autouse=True)
def environment():
    """PEFT's BOFT leaves CC and CXX as gcc where its CUDA extension does not build, and with them C++ links no more."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def counted(monkeypatch):
    """How often the kernels rotated."""
    calls = []
    rotate = _peft_rotation.block_rotate

    def counting(x, R):
        calls.append(tuple(R.shape))
        return rotate(x, R)

    monkeypatch.setattr(_peft_rotation, "block_rotate", counting)
    return calls


def net(b=4, dtype=torch.float32, bias=True, dropout=0.0, masters=True):
    """A small PEFT model in training mode whose rotations and scales are anything but none."""
    torch.manual_seed(3)
    config = BOFTConfig(boft_block_size=b, boft_dropout=dropout, target_modules=["up", "down"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net(bias).to(dtype), config, autocast_adapter_dtype=masters).train()
    return stir(model)


def stir(model):
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "boft_" in name:
            p.data += (0.4 * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return model


def patched(**kwargs):
    """(PEFT's model, the same patched, the handle)."""
    own = net(**kwargs)
    fast = copy.deepcopy(own)
    return own, fast, lk.patch(fast)


def trained(model, x, seed=1):
    torch.manual_seed(seed)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), (leaf, *wanted))]


def layer_of(model):
    return model.base_model.model.up


@pytest.mark.parametrize("shape", ((1, K), (5, K), (2, 3, K)))
@pytest.mark.parametrize("b, bias, dropout", ((4, True, 0.0), (2, False, 0.0), (8, True, 0.5)))
def test_outputs_and_gradients(counted, b, bias, dropout, shape):
    own, fast, handle = patched(b=b, bias=bias, dropout=dropout)
    assert set(handle.report().layers.values()) == {FAST}
    exact, x = copy.deepcopy(own).double(), torch.randn(shape)
    if not dropout:  # whose mask PEFT makes in the default dtype
        for result, oracle, plain in zip(trained(fast, x), trained(exact, x.double()), trained(own, x), strict=True):
            noise = 16 * K**0.5 * 2**-24 * float(oracle.abs().max())
            assert_within_rule(result.detach(), oracle.detach(), plain.detach(), noise=noise)
    else:
        for result, plain in zip(trained(fast, x), trained(own, x), strict=True):
            torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-4)
    assert len(counted) == 2
    own.eval(), fast.eval()
    torch.testing.assert_close(fast(x), own(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_no_less_exact_than_peft(counted, dtype):
    own, fast, _ = patched(dtype=dtype)
    exact, x = copy.deepcopy(own).double(), torch.randn(512, K).to(dtype)
    with torch.no_grad():
        oracle, plain, result = (layer_of(m)(v) for m, v in ((exact, x.double()), (own, x), (fast, x)))
    assert result.dtype == dtype
    assert len(counted) == 1
    assert_within_rule(result, oracle, plain)


def test_lifecycle(counted):
    own, fast, handle = patched()
    x = torch.randn(5, K)
    for m in (own, fast):
        m.add_adapter("other", BOFTConfig(boft_block_size=8, target_modules=["up", "down"]))
        stir(m)
        m.set_adapter("other")
    torch.testing.assert_close(fast(x), own(x), rtol=1e-4, atol=1e-4)
    assert {counted.pop()[-1], counted.pop()[-1]} == {8}
    with own.disable_adapter(), fast.disable_adapter():
        assert torch.equal(fast(x), own(x))
        assert "disabled" in next(iter(handle.report().layers.values()))
    assert not counted
    for m in (own, fast):
        m.set_adapter("default")
        m.merge_adapter()
    torch.testing.assert_close(fast(x), own(x))
    assert "merged" in next(iter(handle.report().layers.values()))
    for m in (own, fast):
        m.unmerge_adapter()
        m.delete_adapter("other")
    torch.testing.assert_close(fast(x), own(x), rtol=1e-4, atol=1e-4)
    assert len(counted) == 2
    assert own.state_dict().keys() == fast.state_dict().keys()
    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(again(x), fast(x))
    handle.unpatch()
    assert [type(m) for m in own.modules()] == [type(m) for m in fast.modules()]


def test_checkpointing(counted):
    own, fast, _ = patched()
    x = torch.randn(5, K)
    leaf, expected = x.clone().requires_grad_(), trained(own, x)[1]
    checkpoint(fast, leaf, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4)
    assert len(counted) == 4


CHANGES = {
    "autocast": (lambda layer: None, "autocast"),
    "own forward": (lambda layer: setattr(layer, "forward", lambda x: x), "forward was replaced"),
    "half blocks": (lambda layer: layer.boft_R.to(torch.bfloat16), "blocks are bfloat16"),
    "no adapter": (lambda layer: layer.set_adapter([]), "no active adapter"),
    "two factors": (
        lambda layer: layer.boft_R.update({"default": torch.nn.Parameter(layer.boft_R["default"].repeat(2, 1, 1, 1))}),
        "butterfly factors",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_why_pefts_own_forward_runs(counted, change):
    _, fast, handle = patched()
    act, words = CHANGES[change]
    act(layer_of(fast))
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert words in handle.report().layers["base_model.model.up"]
        if change == "autocast":
            fast(torch.randn(3, K))
            assert not counted


def test_several_adapters_run_pefts(counted):
    own, fast, handle = patched()
    for m in (own, fast):
        m.add_adapter("other", BOFTConfig(boft_block_size=4, target_modules=["up", "down"]))
        stir(m)
        m.base_model.set_adapter(["default", "other"])
    x = torch.randn(4, K)
    assert torch.equal(fast(x), own(x))
    assert set(handle.report().layers.values()) == {"several active adapters"}
    assert not counted


def test_bad_input_raises_what_peft_raises():
    own, fast, _ = patched()
    for x in (torch.randn(4, K + 1), torch.randint(9, (4, K))):
        with pytest.raises(RuntimeError) as expected:
            own(x)
        with pytest.raises(RuntimeError) as actual:
            fast(x)
        assert str(actual.value) == str(expected.value)
