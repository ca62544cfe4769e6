"""Patched LoRA over bitsandbytes' layers: outputs, gradients and dtypes, against float64 and PEFT."""

import itertools

import pytest
import torch

pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

from nets import close, config, up_of  # noqa: E402
from packed_bases import BASES, K, N, PackedPair, kernels, net, ran, truth  # noqa: E402
from seeded import seed_dropout  # noqa: E402

from lora_kernels.integrations.peft import FAST  # noqa: E402
from lora_kernels.ops.lora_linear import draw_seed  # noqa: E402
from lora_kernels.reference.dropout import dropout_mask, keep_scale  # noqa: E402
from lora_kernels.testing import assert_within_rule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def a_kernel():
    with kernels():
        yield


def assert_right(results, exact, plain, noise):
    for what, got, want, theirs, most in zip(("y", "dx", "dA", "dB"), results, exact, plain, noise, strict=True):
        assert got.dtype == theirs.dtype, what
        assert_within_rule(got, want, theirs, noise=most, what=what)


def shares(layer):
    """Whether the kernels read the parameter's own bytes."""
    from lora_kernels.integrations import _peft_packed

    weight = _peft_packed._packed[layer].weight()
    return weight.codes.data_ptr() == layer.base_layer.weight.data_ptr()


class TestOneAdapter:
    @pytest.mark.parametrize("training", (True, False))
    @pytest.mark.parametrize("dtype, compute, masters", ((F32, None, True), (BF16, BF16, True), (BF16, BF16, False)))
    @pytest.mark.parametrize("base", BASES)
    def test_outputs_and_gradients(self, calls, base, dtype, compute, masters, training):
        pair = PackedPair(net(base, compute, masters, dtype))
        twin, layer = (up_of(m).train(training) for m in pair)
        x = torch.randn(3, 40, K).to(dtype)
        exact, noise = truth(layer, x)
        assert_right(ran(layer, x), exact, ran(twin, x), noise)
        with torch.no_grad():
            assert_within_rule(layer(x), exact[0], twin(x), noise=noise[0])
        assert calls.take() == (2, 0)
        assert shares(layer)
        assert pair.handle.report().layers["base_model.model.up"] == FAST

    @pytest.mark.parametrize("dtype, compute", ((F32, BF16), (BF16, F32), (F16, None), (F16, BF16), (F32, F16)))
    def test_other_compute_dtypes(self, calls, dtype, compute):
        """What the base layer computes in is not what its input comes in: gradients are as exact as PEFT's."""
        pair = PackedPair(net("nf4", compute, True, dtype))
        twin, layer = (up_of(m) for m in pair)
        x = torch.randn(120, K).to(dtype)
        exact, noise = truth(layer, x)
        assert_right(ran(layer, x), exact, ran(twin, x), noise)
        assert calls.take() == (1, 0)
        assert layer.base_layer.compute_dtype == twin.base_layer.compute_dtype

    @pytest.mark.parametrize("dtype", (F32, BF16))
    @pytest.mark.parametrize("base", ("nf4 nested", "int8"))
    def test_dropout(self, calls, base, dtype):
        pair = PackedPair(net(base, None if dtype is F32 else dtype, True, dtype, lora_dropout=0.3))
        seed_dropout(pair.twin)
        twin, layer = (up_of(m) for m in pair)
        x = torch.randn(120, K).to(dtype)
        state = torch.get_rng_state()
        mask = dropout_mask(draw_seed(x), len(x), K, 0.3) * keep_scale(0.3)
        results = []
        for module in (layer, twin):
            torch.set_rng_state(state)
            results.append(ran(module, x))
        exact, noise = truth(layer, x, mask)
        assert_right(results[0], exact, results[1], noise)
        assert calls.take() == (1, 0)

    @pytest.mark.parametrize("shape", ((K,), (7, K), (2, 3, 2, K), (2, 0, K)))
    @pytest.mark.parametrize("base", ("nf4", "int8"))
    def test_shapes(self, calls, base, shape):
        pair = PackedPair(net(base))
        x = torch.randn(shape)
        with torch.no_grad():
            y = up_of(pair.model)(x)
            if x.numel():
                close(y, up_of(pair.twin)(x))
        assert y.shape == (*shape[:-1], N)
        assert calls.take() == (1, 0)

    @pytest.mark.parametrize("base", ("nf4", "int8"))
    def test_bias(self, base):
        """A trained one, and one of another dtype, which is taken as it is and left as it is."""
        pair = PackedPair(net(base))
        x, grads = torch.randn(9, K), []
        for m in pair:
            bias = up_of(m).base_layer.bias.requires_grad_()
            m(x).square().sum().backward()
            grads.append(bias.grad)
        close(grads[1], grads[0])
        pair = PackedPair(net(base, BF16, True, BF16))
        for m in pair:
            up_of(m).base_layer.bias.data = torch.linspace(-1, 1, N)
        exact, noise = truth(up_of(pair.model), x.bfloat16())
        assert_right(ran(up_of(pair.model), x.bfloat16()), exact, ran(up_of(pair.twin), x.bfloat16()), noise)
        assert up_of(pair.model).base_layer.bias.dtype is F32

    @pytest.mark.parametrize("training", (True, False))
    @pytest.mark.parametrize("base", BASES)
    def test_the_base_layers_own_forward_is_not_called(self, monkeypatch, base, training):
        """With an adapter, without, merged and in a mixed batch."""
        model, x = PackedPair(net(base, lora_dropout=0.1)).model.train(training), torch.randn(5, K)

        def refuse(*args, **kwargs):
            raise AssertionError("bitsandbytes was called")

        monkeypatch.setattr(type(up_of(model).base_layer), "forward", refuse)
        model(x).sum().backward()
        with model.disable_adapter():
            model(x)
        if not training:
            model(x, adapter_names=["default", "__base__"] * 2 + ["default"])
        model.merge_adapter()
        with pytest.raises(AssertionError, match="was called"):
            up_of(model).base_layer(x)
        model(x)

    def test_bytes_are_read_anew(self, calls):
        """Written in place, other memory, other statistics."""
        pair = PackedPair(net("nf4"))
        x = torch.randn(5, K)
        weight = [up_of(m).base_layer.weight for m in pair]
        changes = (
            lambda w: w.data.copy_(w.data.flip(0)),
            lambda w: setattr(w, "data", w.data.clone()),
            lambda w: w.quant_state.absmax.mul_(2),
            lambda w: setattr(w.quant_state, "absmax", w.quant_state.absmax * 3),
        )
        seen = [pair.same(calls, lambda m: up_of(m)(x).detach())]
        for change in changes:
            for w in weight:
                change(w)
            seen.append(pair.same(calls, lambda m: up_of(m)(x).detach()))
        assert shares(up_of(pair.model))
        assert sum(not torch.equal(a, b) for a, b in itertools.pairwise(seen)) == 3

    def test_nested_statistics_are_read_anew(self, calls):
        pair = PackedPair(net("nf4 nested"))
        x = torch.randn(5, K)
        before = pair.same(calls, lambda m: up_of(m)(x).detach())
        for m in pair:
            up_of(m).base_layer.weight.quant_state.absmax.copy_(up_of(m).base_layer.weight.quant_state.absmax.flip(0))
        assert not torch.equal(pair.same(calls, lambda m: up_of(m)(x).detach()), before)


class TestAutocast:
    @pytest.mark.parametrize("training", (True, False))
    @pytest.mark.parametrize("dtype, compute", ((F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32)))
    @pytest.mark.parametrize("base", ("nf4", "int8"))
    def test_results_have_pefts_dtype_and_are_no_less_exact(self, calls, base, dtype, compute, training):
        pair = PackedPair(net(base, compute, True, dtype))
        twin, layer = (up_of(m).train(training) for m in pair)
        x = torch.randn(200, K).to(dtype)
        exact, noise = truth(layer, x)
        results, plain = (ran(m, x, autocast=True) for m in (layer, twin))
        assert_right(results, exact, plain, noise)
        assert calls.take() == (1, 0)


class TestSeveral:
    """Several adapters in a call."""

    @pytest.mark.parametrize("kwargs", ({}, dict(lora_dropout=0.2), dict(lora_bias=True)))
    @pytest.mark.parametrize("base", ("nf4", "int8"))
    def test_active_at_once(self, calls, base, kwargs):
        model = net(base, **kwargs)
        model.add_adapter("low", config(r=2, lora_alpha=5, **kwargs))
        pair = PackedPair(model)
        for m in pair:
            for layer in (up_of(m), m.base_model.model.down):
                layer.set_adapter(["default", "low"])
            m.train()
        x = torch.randn(6, K)

        def run(m):
            m.zero_grad()
            y = m(x)
            y.square().mean().backward()
            return y.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        grads = pair.same(calls, run)[1]
        assert len(grads) == 8 + 4 * bool(kwargs.get("lora_bias"))

    @pytest.mark.parametrize("names", (["default", "low", "__base__", "low"], ["low"] * 4, ["__base__"] * 4))
    @pytest.mark.parametrize("grad", (False, True))
    def test_mixed_batch(self, calls, names, grad):
        model = net("nf4 nested")
        model.add_adapter("low", config(r=2, lora_alpha=5, targets=("up",)))
        pair = PackedPair(model.eval())
        x = torch.randn(4, 3, K)
        with torch.set_grad_enabled(grad):
            wanted, got = (m(x, adapter_names=names).detach() for m in pair)
        close(got, wanted)
        assert calls.take() == (2, 0)

    @pytest.mark.parametrize("dtype", (F32, BF16))
    def test_mixed_batch_in_one_sum(self, dtype):
        """Each row as its adapter alone gives it, no less exact than PEFT."""
        model = net("nf4", dtype, True, dtype)
        model.add_adapter("low", config(r=2, lora_alpha=5))
        pair = PackedPair(model.eval())
        x, names = torch.randn(40, 5, K).to(dtype), ["default", "low"] * 20
        ends = [truth(up_of(pair.model), x[i::2], adapter=name) for i, name in enumerate(("default", "low"))]
        with torch.no_grad():
            plain, y = (up_of(m)(x, adapter_names=names) for m in pair)
        for i, (exact, noise) in enumerate(ends):
            assert_within_rule(y[i::2], exact[0], plain[i::2], noise=noise[0])
