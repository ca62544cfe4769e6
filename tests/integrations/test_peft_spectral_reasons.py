"""What keeps a layer of the spectral tuners from running fast: PEFT's own forward runs, and the report says why."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from nets import K, replace_forward, swap_class, tagged, trained, up_of
from peft.tuners.fourierft.layer import FourierFTLinear
from peft.tuners.waveft.layer import WaveFTLinear
from seeded import Pair
from spectra import KINDS, net, places_of, values_of

import lora_kernels as lk
from lora_kernels.integrations.peft import FAST

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]
EACH = pytest.mark.parametrize("kind", KINDS)


def scale_by_a_tensor(m, kind):
    held = up_of(m).fourierft_scaling if kind == "fourier" else up_of(m).waveft_scaling
    held["default"] = torch.tensor(3.0)


def repeat_a_place(m, kind):
    places_of(up_of(m), kind)["default"][:, 0] = places_of(up_of(m), kind)["default"][:, 1]


def count_from_the_end(m, kind):
    places_of(up_of(m), kind)["default"][0] -= up_of(m).out_features


def tag(m, kind):
    spectra = up_of(m).fourierft_spectrum if kind == "fourier" else up_of(m).waveft_spectrum
    spectra["default"] = tagged(values_of(up_of(m), kind))


def tag_places(m, kind):
    from nets import Tagged

    places = places_of(up_of(m), kind)
    places["default"] = places["default"].as_subclass(Tagged)


CHANGES = {
    "scaling": (scale_by_a_tensor, "adapter 'default': scaling is a Tensor"),
    "one place twice": (repeat_a_place, "adapter 'default': two of its places are the same"),
    "negative places": (count_from_the_end, "adapter 'default': its places: rows[0] is -"),
    "tagged places": (tag_places, "adapter 'default': its places are no plain tensor"),
    "no adapter": (lambda m, _: m.base_model.set_adapter([]), "no active adapter"),
}


@EACH
@pytest.mark.parametrize("change", CHANGES)
def test_change_of_a_layer(calls, kind, change):
    """The other layer stays fast, and so does this one before."""
    if (kind, change) == ("haar", "negative places"):
        pytest.skip("PEFT places them elsewhere")
    pair = Pair(net(kind))
    x = torch.randn(5, K)
    pair.same(calls, lambda m: trained(m, x), rtol=1e-4, atol=1e-4)
    act, reason = CHANGES[change]
    pair.do(lambda m: act(m, kind))
    expected = reason if change == "no adapter" else {"up": reason, "down": FAST}
    pair.same(calls, lambda m: trained(m, x), expected, rtol=1e-4, atol=1e-4)


@EACH
def test_a_spectrum_of_a_subclass(calls, kind):
    pair = Pair(net(kind))
    pair.do(lambda m: tag(m, kind))
    assert pair.handle.report().layers["base_model.model.up"] == "adapter 'default': its spectrum is Tagged"
    x = torch.randn(5, K)
    with torch.no_grad():
        torch.testing.assert_close(up_of(pair.model)(x), up_of(pair.twin)(x))
    assert calls.take() == (0, 1)


@pytest.mark.parametrize("family", ("db2", "sym3"))
def test_other_wavelets(calls, family):
    pair = Pair(net("haar", wavelet_family=family))
    reason = f"adapter 'default': its wavelet is {family}, not db1"
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)), reason)
    pair.do(lambda m: m.merge_adapter())
    torch.testing.assert_close(*(up_of(m).base_layer.weight for m in pair), rtol=0, atol=0)


@EACH
def test_autocast(calls, kind):
    pair = Pair(net(kind))
    with torch.autocast("cpu", torch.bfloat16):
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), "autocast", rtol=0, atol=0)
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)), rtol=1e-4, atol=1e-4)


@EACH
def test_float64(calls, kind):
    pair = Pair(net(kind).double())
    x = torch.randn(5, K, dtype=torch.float64)
    pair.same(calls, lambda m: trained(m, x), "input is float64", rtol=0, atol=0)


@EACH
def test_a_spectrum_of_another_dtype(calls, kind):
    pair = Pair(net(kind))
    pair.do(lambda m: [setattr(p, "data", p.data.bfloat16()) for n, p in m.named_parameters() if "spectrum" in n])
    reason = "adapter 'default': its spectrum is bfloat16, the input float32"
    pair.same(calls, lambda m: m(torch.randn(5, K)).detach(), reason, rtol=0.02, atol=0.02)


@EACH
def test_input_casting_disabled(calls, kind):
    pair = Pair(net(kind))
    pair.do(lambda m: setattr(up_of(m), "cast_input_dtype_enabled", False))
    expected = {"up": "input dtype casting is disabled", "down": FAST}
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)), expected, rtol=1e-4, atol=1e-4)


@EACH
def test_torch_func(calls, kind):
    """Which differentiates PEFT's own forward, forward and backward."""
    pair = Pair(net(kind))
    x, v = torch.randn(2, 5, K)
    wanted, actual = (torch.func.vjp(m, x)[1](torch.ones(5, K))[0] for m in pair)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    wanted, actual = (torch.func.jvp(lambda t, m=m: m(t), (x,), (v,))[1] for m in pair)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert calls.take() == (0, 4)


@EACH
def test_bad_input_raises_what_peft_raises(calls, kind):
    pair = Pair(net(kind))
    for x in (torch.randn(4, K + 1), torch.randint(9, (4, K))):
        with pytest.raises(RuntimeError) as expected:
            pair.twin(x)
        with pytest.raises(RuntimeError) as actual:
            pair.model(x)
        assert str(actual.value) == str(expected.value)


@EACH
def test_compiled_models_run_peft(calls, kind):
    pair = Pair(net(kind))
    x = torch.randn(4, K)
    torch._dynamo.reset()
    compiled = torch.compile(pair.model, backend="aot_eager")
    torch.testing.assert_close(trained(compiled, x)[:2], trained(pair.twin, x)[:2], rtol=1e-4, atol=1e-4)
    assert calls.take() == (0, 0)


@EACH
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_models_run_peft(calls, kind):
    pair = Pair(net(kind, n=30).requires_grad_(False))
    x = torch.randn(4, K)
    traced = torch.jit.trace(pair.model, x, check_trace=False)
    assert not calls.take()[0]
    torch.testing.assert_close(traced(2 * x), pair.twin(2 * x))


@EACH
@pytest.mark.parametrize("strict", (True, False))
def test_exported_models_run_peft(calls, kind, strict):
    if strict and kind == "haar":
        pytest.skip("torch can't export PEFT's own")
    pair = Pair(net(kind).requires_grad_(False))
    x = torch.randn(4, K)
    exported = torch.export.export(up_of(pair.model), (x,), strict=strict)
    assert not calls.take()[0]
    torch.testing.assert_close(exported.module()(2 * x), up_of(pair.twin)(2 * x))


def test_layer_class_with_its_own_methods(calls):
    class Loud(FourierFTLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Own(WaveFTLinear):
        def get_delta_weight(self, adapter):
            return 2 * super().get_delta_weight(adapter)

    model = nn.Sequential(net("fourier"), net("haar"))
    swap_class(up_of(model[0]), Loud)
    swap_class(up_of(model[1]), Own)
    pair = Pair(model)
    assert type(up_of(model[0])) is Loud
    assert type(up_of(model[1])) is Own
    layers = pair.handle.report().layers
    assert layers["0.base_model.model.up"].endswith("Loud has its own forward")
    assert layers["1.base_model.model.up"].endswith("Own has its own get_delta_weight")
    with torch.no_grad():
        x = torch.randn(4, K)
        torch.testing.assert_close(model(x), pair.twin(x), rtol=1e-4, atol=1e-4)
    assert calls.take() == (2, 0)


def test_methods_replaced_on_the_instance(calls):
    """The wrapper calls the patched forward or PEFT's, whichever it took hold of; a ΔW of one's own is used."""
    pair = Pair(net("haar"))
    pair.do(lambda m: replace_forward(up_of(m)))

    def double(layer):
        layer.get_delta_weight = lambda adapter, own=layer.get_delta_weight: 2 * own(adapter)

    pair.do(lambda m: double(m.base_model.model.down))
    layers = pair.handle.report().layers
    assert layers["base_model.model.up"] == "the layer's forward was replaced on the instance"
    assert layers["base_model.model.down"] == "the layer's get_delta_weight was replaced on the instance"
    with torch.no_grad():
        x = torch.randn(4, K)
        torch.testing.assert_close(pair.model(x), pair.twin(x), rtol=1e-4, atol=1e-4)


def test_unforeseen_refusal_goes_to_peft_and_is_told(monkeypatch, caplog):
    from lora_kernels.integrations import _peft_layer, _peft_spectral_layer

    def refuse(*_, **__):
        raise RuntimeError("no room")

    pair = Pair(net("haar"))
    monkeypatch.setattr(_peft_spectral_layer, "spectral_linear", refuse)
    _peft_layer._warn_once.cache_clear()
    with torch.no_grad(), caplog.at_level("WARNING", "lora_kernels"):
        x = torch.randn(4, K)
        torch.testing.assert_close(pair.model(x), pair.twin(x))
    assert caplog.text.count("RuntimeError: no room") == 1


def test_a_backend_that_is_not_here():
    model = net("fourier")
    handle = lk.patch(model)
    with lk.backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda'"):
        model(torch.randn(4, K))
    assert handle.report().fast == 2


def test_strict():
    model = net("haar", wavelet_family="db4")
    with pytest.raises(
        ValueError, match=r"2 of 2 adapter layers(.|\n)*model\.up: adapter 'default': its wavelet is db4"
    ):
        lk.patch(model, strict=True)
    assert type(up_of(model)) is WaveFTLinear
