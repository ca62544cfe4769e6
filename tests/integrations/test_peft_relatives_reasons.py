"""What keeps a layer of LoRA's relatives from running fast: PEFT's own forward runs, and the report says why."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from nets import Doubling, K, add_hook, replace_forward, swap_class, tagged, trained, up_of
from peft.helpers import disable_input_dtype_casting
from peft.tuners.vera.layer import Linear as VeraLinear
from relatives import KINDS, net
from seeded import Pair

import lora_kernels as lk
from lora_kernels.integrations.peft import FAST

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]
EACH = pytest.mark.parametrize("kind", KINDS)
DROPOUTS = {kind: "delora_dropout" if kind == "delora" else dropout for kind, (_, _, dropout, _) in KINDS.items()}


def dropouts(m, kind):
    return getattr(up_of(m), DROPOUTS[kind])


CHANGES = {
    "hook on base": (lambda m, _: add_hook(up_of(m).base_layer), "base layer has hooks"),
    "backward hook on base": (
        lambda m, _: up_of(m).base_layer.register_full_backward_hook(lambda mod, gi, go: (2 * gi[0],)),
        "base layer has hooks",
    ),
    "forward of base replaced": (lambda m, _: replace_forward(up_of(m).base_layer), "base layer: its forward"),
    "other base class": (lambda m, _: swap_class(up_of(m).base_layer, Doubling), "base layer is Doubling"),
    "trained base weight": (lambda m, _: up_of(m).base_layer.weight.requires_grad_(), "base weight requires grad"),
    "hook on dropout": (lambda m, kind: add_hook(dropouts(m, kind)["default"]), "dropout has hooks"),
    "other dropout": (lambda m, kind: dropouts(m, kind).update({"default": nn.Hardtanh()}), "dropout is Hardtanh"),
    "no adapter": (lambda m, _: m.base_model.set_adapter([]), "no active adapter"),
}


@EACH
@pytest.mark.parametrize("change", CHANGES)
def test_change_of_a_layer(calls, kind, change):
    """The other layer stays fast, and so does this one before."""
    if (kind, change) == ("adalora", "backward hook on base"):
        pytest.skip("PEFT's in-place sum refuses it")
    if DROPOUTS[kind] is None and change.endswith("dropout"):
        pytest.skip("it has none")
    pair = Pair(net(kind))
    x = torch.randn(5, K)
    pair.same(calls, lambda m: trained(m, x))
    act, reason = CHANGES[change]
    pair.do(lambda m: act(m, kind))
    expected = reason if change == "no adapter" else {"up": reason, "down": FAST}
    pair.same(calls, lambda m: trained(m, x), expected)


@EACH
def test_tensors_of_subclasses(calls, kind):
    """A base weight's, and with it the output's, which a layer after it gets."""
    pair = Pair(net(kind))
    pair.do(lambda m: setattr(up_of(m).base_layer, "weight", tagged(up_of(m).base_layer.weight)))
    layers = pair.handle.report().layers
    assert [reason.endswith("its weight is Tagged") for reason in layers.values()] == [True, False]
    x = torch.randn(5, K)
    with torch.no_grad():
        torch.testing.assert_close(pair.model(x), pair.twin(x))
    assert calls.take() == (0, 2)


@EACH
def test_autocast(calls, kind):
    pair = Pair(net(kind))
    with torch.autocast("cpu", torch.bfloat16):
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), "autocast")
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)))


@EACH
def test_global_hooks(calls, kind):
    pair = Pair(net(kind))
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: None)
    try:
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), "global module hooks")
    finally:
        handle.remove()
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)))


@EACH
def test_float64(calls, kind):
    pair = Pair(net(kind).double())
    pair.same(calls, lambda m: trained(m, torch.randn(5, K, dtype=torch.float64)), "input is float64")


@EACH
def test_bad_input_raises_what_peft_raises(calls, kind):
    pair = Pair(net(kind))
    for x in (torch.randn(4, K + 1), torch.randint(9, (4, K)))[: 1 if kind == "hra" else 2]:  # which casts integers
        with pytest.raises(RuntimeError) as expected:
            pair.twin(x)
        with pytest.raises(RuntimeError) as actual:
            pair.model(x)
        assert str(actual.value) == str(expected.value)


@EACH
def test_arguments_beyond_x_reach_peft(calls, kind):
    if kind == "hra":
        pytest.skip("PEFT's takes arguments of any name, and leaves them")
    pair = Pair(net(kind))
    for m in pair:
        with pytest.raises(TypeError, match="unexpected keyword argument 'offset'"):
            up_of(m)(torch.randn(4, K), offset=1)
    assert calls.take() == (0, 0)


@EACH
def test_compiled_models_run_peft(calls, kind):
    pair = Pair(net(kind).eval())
    x = torch.randn(4, K)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(pair.model, backend="eager")(x), pair.twin(x))
    assert calls.take() == (0, 0)


def test_adapters_of_another_dtype(calls):
    pair = Pair(net("delora"))
    pair.do(lambda m: up_of(m).delora_A.update({"default": nn.Parameter(up_of(m).delora_A["default"].half())}))
    assert "delora_A is float16" in pair.handle.report().layers["base_model.model.up"]
    for m in pair:
        with pytest.raises(RuntimeError, match="dtype"):
            m(torch.randn(4, K))


def test_input_casting_disabled(calls):
    pair = Pair(net("miss"))
    with disable_input_dtype_casting(pair.twin), disable_input_dtype_casting(pair.model):
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), "input dtype casting is disabled")


def test_hook_on_the_rotation(calls):
    pair = Pair(net("psoft"))
    pair.do(lambda m: add_hook(up_of(m).psoft_R["default"]))
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)), {"up": "psoft_R has hooks", "down": FAST})


def test_bat_makes_another_weight(calls):
    pair = Pair(net("miss", init_weights="bat"))
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)), "MiSS 'bat'")


def test_rank_zero(calls):
    pair = Pair(net("adalora"))
    pattern = {f"{end}.lora_E.default": [False] * 4 for end in ("up", "down")}
    pair.do(lambda m: m.base_model.resize_modules_by_rank_pattern(pattern, "default"))
    with torch.no_grad():
        pair.same(calls, lambda m: m(torch.randn(5, K)), "its rank is 0")


def test_rank_beyond_the_kernels(calls):
    pair = Pair(net("vera", r=513))
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)), "its rank is 513, above 512", rtol=1e-4, atol=1e-3)


def test_layer_class_with_its_own_forward(calls):
    class Loud(VeraLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = net("vera")
    swap_class(up_of(model), Loud)
    pair = Pair(model)
    assert type(up_of(model)) is Loud
    layers = pair.handle.report().layers
    assert layers["base_model.model.up"].endswith("Loud has its own forward")
    with torch.no_grad():
        x = torch.randn(4, K)
        torch.testing.assert_close(model(x), pair.twin(x))
    assert calls.take() == (1, 0)


def test_unforeseen_refusal_goes_to_peft_and_is_told(monkeypatch, caplog):
    from lora_kernels.integrations import _peft_layer, _peft_relatives_layer

    def refuse(*_):
        raise RuntimeError("no room")

    pair = Pair(net("vera"))
    monkeypatch.setattr(_peft_relatives_layer, "lora", refuse)
    _peft_layer._warn_once.cache_clear()
    with torch.no_grad(), caplog.at_level("WARNING", "lora_kernels"):
        x = torch.randn(4, K)
        assert torch.equal(pair.model(x), pair.twin(x))
    assert caplog.text.count("RuntimeError: no room") == 1


def test_forward_replaced_on_the_instance(calls):
    """The wrapper calls the patched forward or PEFT's, whichever it took hold of."""
    pair = Pair(net("vera"))
    pair.do(lambda m: replace_forward(up_of(m)))
    reason = pair.handle.report().layers["base_model.model.up"]
    assert reason == "the layer's forward was replaced on the instance"
    with torch.no_grad():
        x = torch.randn(4, K)
        torch.testing.assert_close(pair.model(x), pair.twin(x))


def test_strict():
    model = net("vera")
    add_hook(up_of(model).base_layer)
    with pytest.raises(ValueError, match=r"1 of 2 adapter layers(.|\n)*model\.up: VeRA needs a plain base"):
        lk.patch(model, strict=True)
    assert type(up_of(model)) is VeraLinear
