"""A patched layer keeps what it found out of itself: a change of anything since is noticed at the next call."""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from nets import BATCHES, Doubling, K, N, adapters, add_hook, both, close, config, net, replace_forward, up_of, warm
from seeded import seed_dropout
from torch.nn.utils.stateless import _reparametrize_module

from lora_kernels.integrations import _peft_state
from lora_kernels.ops._dispatch import extension

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]
needs_extension = pytest.mark.skipif(extension is None, reason="nothing is kept without the compiled extension")


KEEPER = "_lora_kernels_states"


def kept(layer):
    """How many states are kept of the layer."""
    return extension.remembered(layer)


def weight(module):
    return nn.Parameter(torch.full_like(module.weight, 0.25), module.weight.requires_grad)


def linear(module):
    new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    nn.init.constant_(new.weight, 0.125)
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new


#: name -> (what is done to the layer, whether it stays fast)
CHANGES = {
    "weight in place": (lambda up: up.lora_A.default.weight.data.mul_(2), True),
    "weight.data": (lambda up: setattr(up.lora_A.default.weight, "data", torch.ones(4, K)), True),
    "weight.data of other strides": (lambda up: setattr(up.lora_A.default.weight, "data", torch.ones(K, 4).T), True),
    "weight replaced": (lambda up: setattr(up.lora_A.default, "weight", weight(up.lora_A.default)), True),
    "weight replaced behind the module": (
        lambda up: up.lora_B.default._parameters.update(weight=weight(up.lora_B.default)),
        True,
    ),
    "base weight replaced": (lambda up: setattr(up.base_layer, "weight", weight(up.base_layer)), True),
    "base bias removed": (lambda up: setattr(up.base_layer, "bias", None), True),
    "lora_A replaced": (lambda up: up.lora_A.update({"default": linear(up.lora_A.default)}), True),
    "lora_B replaced behind the module": (
        lambda up: up.lora_B._modules.update(default=linear(up.lora_B.default)),
        True,
    ),
    "all of lora_A replaced": (
        lambda up: setattr(up, "lora_A", nn.ModuleDict({"default": linear(up.lora_A.default)})),
        True,
    ),
    "all parameters of lora_B replaced": (
        lambda up: setattr(up.lora_B.default, "_parameters", {"weight": weight(up.lora_B.default), "bias": None}),
        True,
    ),
    "all modules of lora_B replaced": (
        lambda up: setattr(up.lora_B, "_modules", {**up.lora_B._modules, "default": linear(up.lora_B.default)}),
        True,
    ),
    "base replaced": (lambda up: setattr(up, "base_layer", linear(up.base_layer)), True),
    "scaling": (lambda up: up.scaling.update(default=0.75), True),
    "all of scaling": (lambda up: setattr(up, "scaling", {**up.scaling, "default": 0.75}), True),
    "adapters disabled": (lambda up: up.enable_adapters(False), False),
    "merged": (lambda up: up.merge(), False),
    "hook": (lambda up: add_hook(up.lora_B.default), False),
    "pre-hook on the base": (
        lambda up: up.base_layer.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
        True,
    ),
    "forward replaced": (lambda up: replace_forward(up.lora_A.default), False),
    "forward of the base replaced": (lambda up: replace_forward(up.base_layer), True),
    "dropout replaced": (lambda up: up.lora_dropout.update({"default": nn.Hardtanh()}), False),
    "bias": (lambda up: setattr(up.lora_A.default, "bias", nn.Parameter(torch.ones(4))), False),
    "no parameter": (
        lambda up: (
            up.lora_A.default._parameters.pop("weight"),
            setattr(up.lora_A.default, "weight", torch.ones(4, K)),
        ),
        False,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mixed", (False, True))
def test_changes(calls, change, mixed):
    change, fast = CHANGES[change]
    oracle, model, _ = both(adapters())
    names = {"adapter_names": BATCHES[0]} if mixed and change is not CHANGES["merged"][0] else {}
    for _ in range(2):
        warm(model, **names)
    assert extension is None or kept(up_of(model))
    calls.take()
    for m in (oracle, model):
        change(up_of(m))
    x = torch.randn(4, K)
    with torch.no_grad():
        close(model(x, **names), oracle(x, **names))
    assert calls.take() == (1 + fast, 1 - fast)


def test_dropout_in_training(calls):
    oracle, model, _ = both(net(lora_dropout=0.5))
    seed_dropout(oracle)
    warm(model)
    calls.take()
    x = torch.randn(4, K)
    for train in (True, False):
        for m in (oracle, model):
            m.train(train)
        with torch.no_grad():
            torch.manual_seed(0)
            expected = oracle(x)
            torch.manual_seed(0)
            close(model(x), expected)
        assert calls.take() == (2, 0)


def test_functional_call_with_parameters(calls):
    """Parameters in place of others, behind the modules' backs, for one call."""
    oracle, model, _ = both(net())
    warm(model)
    x = torch.randn(4, K)
    others = {n: nn.Parameter(torch.randn_like(p), p.requires_grad) for n, p in model.named_parameters()}
    with torch.no_grad():
        before = model(x)
        for m in (model, oracle):
            with _reparametrize_module(m, others):
                close(m(x), torch.func.functional_call(oracle, others, (x,)))
        assert torch.equal(model(x), before)


@needs_extension
def test_looked_up_once(monkeypatch):
    """While nothing changes, whatever the batch's size and names."""
    _, model, _ = both(adapters())
    looked = []
    inner = _peft_state.look
    monkeypatch.setattr(_peft_state, "look", lambda *args: (looked.append(args[1]), inner(*args))[1])
    with torch.no_grad():
        for rows in (4, 4, 8):
            model(torch.randn(rows, K))
            model(torch.randn(rows, K), adapter_names=["low", "pattern"] * (rows // 2))
    assert looked == [None, None, ("low", "pattern"), ("low", "pattern")]


@needs_extension
def test_keeps_few_states():
    _, model, _ = both(adapters())
    names = ["default", "low", "up_only", "pattern", "__base__"]
    with torch.no_grad():
        for first in names:
            for second in names:
                model(torch.randn(2, K), adapter_names=[first, second])
    assert kept(up_of(model)) == 4


def test_lets_go_of_deleted_adapters():
    _, model, _ = both(adapters())
    warm(model, adapter_names=["default", "low", "pattern", "low"])
    gone = weakref.ref(up_of(model).lora_A.low.weight)
    model.delete_adapter("low")
    gc.collect()
    assert gone() is None


def test_lets_go_of_what_was_replaced():
    """Of an old base weight in every state, when the layer is slow from then on."""
    _, model, _ = both(adapters())
    for names in (["low"] * 4, ["pattern"] * 4, ["low", "default"] * 2):
        warm(model, adapter_names=names)
    gone = weakref.ref(up_of(model).base_layer.weight)
    up_of(model).base_layer = Doubling(K, N)
    warm(model, adapter_names=["low"] * 4)
    gc.collect()
    assert gone() is None


@needs_extension
def test_a_warm_model_dies_with_its_last_reference():
    _, model, handle = both(net())
    warm(model)
    up = up_of(model)
    gone = weakref.ref(up.lora_A.default.weight)
    assert kept(up)
    model.base_model.model.up = None
    del up
    gc.disable()
    try:
        assert handle.model is model
        gc_needed = gone() is not None
    finally:
        gc.enable()
    assert not gc_needed


def owner(up):
    up.base_layer.owner = up


def hook_that_knows(up):
    up.register_forward_hook(lambda module, args, y: up and None)


def accelerate_hook(up):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(up, hooks.ModelHook())


@pytest.mark.parametrize("tie", (owner, hook_that_knows, accelerate_hook))
def test_a_warm_layer_that_refers_to_itself_dies(tie):
    _, model, _ = both(net())
    up = up_of(model)
    tie(up)
    for _ in range(2):
        warm(model)
    gone = weakref.ref(up), weakref.ref(up.lora_A.default.weight)
    del up, model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_lets_go_of_what_moves():
    _, model, _ = both(net())
    warm(model)
    gone = weakref.ref(up_of(model).base_layer.weight)
    model.to("meta")
    gc.collect()
    assert gone() is None


@needs_extension
def test_copies_and_unpatching():
    oracle, model, handle = both(adapters())
    warm(model)
    assert up_of(model).__dict__.keys() - up_of(oracle).__dict__.keys() == {KEEPER}
    x = torch.randn(4, K)
    shallow = copy.copy(up_of(model))
    shallow.scaling = {name: 0.0 for name in shallow.scaling}
    with torch.no_grad():
        close(shallow(x), shallow.base_layer(x))
        close(up_of(model)(x), up_of(oracle)(x))
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            up_of(clone).lora_B.default.weight.data.zero_()
            close(up_of(clone)(x), up_of(oracle).base_layer(x))
    handle.unpatch()
    assert up_of(model).__dict__.keys() == up_of(oracle).__dict__.keys()
    assert not kept(up_of(model))


def test_hooks_set_aside_and_put_back(calls):
    _, model, _ = both(net())
    factor = up_of(model).lora_B.default
    add_hook(factor)
    hooks, factor._forward_hooks = factor._forward_hooks, OrderedDict()
    x = torch.randn(4, K)
    with torch.no_grad():
        without = model(x)
        factor._forward_hooks = hooks
        calls.take()
        assert not torch.allclose(model(x), without)
    assert calls.take() == (1, 1)


@pytest.mark.parametrize("globally", (False, True))
def test_hooks_taken_out_and_put_back(calls, globally):
    """Of the dictionary that holds them, which stays the same one."""
    _, model, _ = both(net())
    held = torch.nn.modules.module._global_forward_hooks if globally else up_of(model).base_layer._forward_hooks
    other = nn.Linear(1, 1).register_forward_hook(lambda m, args, y: None)
    hook = {other.id: lambda m, args, y: y + 1 if m is up_of(model).base_layer else None}
    x = torch.randn(4, K)
    with torch.no_grad():
        for _ in range(2):
            without = model(x)
        calls.take()
        held.update(hook)
        try:
            assert not torch.allclose(model(x), without)
        finally:
            held.clear()
        assert bool(calls.take()[1]) == globally
        assert torch.equal(model(x), without)


def test_backward_hook_that_is_gone(calls):
    oracle, model, _ = both(net())
    handle = up_of(model).lora_B.default.register_full_backward_hook(lambda m, gi, go: None)
    warm(model)
    handle.remove()
    calls.take()
    x = torch.randn(4, K)
    close(model(x), oracle(x))
    assert calls.take() == (2, 0)


def test_readding_an_adapter_of_the_same_name(calls):
    pair = both(adapters())
    warm(pair[1], adapter_names=["low"] * 4)
    for m in pair[:2]:
        m.delete_adapter("low")
        torch.manual_seed(0)
        m.add_adapter("low", config(r=2))
    x = torch.randn(4, K)
    calls.take()
    with torch.no_grad():
        close(pair[1](x, adapter_names=["low"] * 4), pair[0](x, adapter_names=["low"] * 4))
    assert calls.take() == (2, 0)
