"""FourierFT and WaveFT, patched, against the same unpatched."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from nets import Doubling, K, N, Net, add_hook, close, swap_class, tagged, trained, up_of
from peft import PeftModel
from seeded import Pair
from spectra import COUNT, KINDS, config, delta_weight, net, places_of, stir, values_of
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.integrations import _peft_spectral, _peft_spectral_layer
from lora_kernels.testing import assert_within_rule, rms

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]
EACH = pytest.mark.parametrize("kind", KINDS)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = Conv1D(N, K), Conv1D(K, N)
        nn.init.normal_(self.up.bias)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@EACH
@pytest.mark.parametrize("shape", ((24, 40), (25, 41), (33, 16), (1, 7), (96, 64)), ids=str)
@pytest.mark.parametrize("dtype, masters", (
    (torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True),
), ids=str)  # fmt: skip
def test_no_less_exact_than_peft(calls, kind, shape, dtype, masters):
    """Of one layer, against the same in fp64: outputs, gradients and ΔW."""
    K, N = shape
    base = nn.Sequential()
    base.up = nn.Linear(K, N)
    pair = Pair(net(kind, base=base, dtype=dtype, masters=masters, n=min(COUNT, K * N), targets=["up"]))
    layer = up_of(pair.model)
    x = torch.randn(300, K).to(dtype)
    dy = torch.randn(300, N).to(dtype)
    held = values_of(layer, kind)
    assert held.dtype == (torch.float32 if masters else dtype)
    places, scale = places_of(layer, kind)["default"], 150.0 if kind == "fourier" else 2.0

    leaf, values = x.double().requires_grad_(), held.detach().double().requires_grad_()
    W = layer.base_layer.weight.detach().double()
    delta = delta_weight(values, places, (N, K), kind, scale)
    y = leaf @ (W + delta).T + layer.base_layer.bias.detach().double()
    exact = [y.detach(), *torch.autograd.grad(y, (leaf, values), dy.double()), delta.detach()]

    found = []
    for one in (up_of(pair.twin), layer):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        grads = torch.autograd.grad(y, (leaf, values_of(one, kind)), dy)
        found.append([y.detach(), *grads, one.get_delta_weight("default").detach()])
    assert calls.take() == (1, 0)
    whole = W + delta.detach()
    terms = (y_terms(x, whole), y_terms(dy, whole.T), rms(exact[2]), rms(exact[3]))
    for name, length, size, want, peer, ours in zip(
        ("y", "dx", "values", "ΔW"), (K, N, 300, held.numel()), terms, exact, *found, strict=True
    ):
        assert ours.dtype == peer.dtype
        if ours.dtype in (torch.bfloat16, torch.float16) and ours.numel() < 256:  # too few for a share of 5 %
            assert rms(ours.double() - want) <= 1.05 * rms(peer.double() - want) + torch.finfo(ours.dtype).eps * size
            continue
        assert_within_rule(ours, want, peer, noise=length**0.5 * 2**-24 * size, what=name)


def y_terms(x, W):
    """The norm of the terms of x Wᵀ."""
    return rms((x.double().square() @ W.square().T).sqrt())


@EACH
class TestTraining:
    @pytest.mark.parametrize("bias", (True, False))
    @pytest.mark.parametrize("shape", ((K,), (1, K), (2, 3, K), (0, K)))
    def test_outputs_and_gradients(self, calls, kind, shape, bias):
        pair = Pair(net(kind, bias))
        x = torch.randn(shape)
        grads = pair.same(calls, lambda m: trained(m, x), rtol=1e-4, atol=1e-4)[2]
        assert len(grads) == sum(p.requires_grad for p in pair.model.parameters()) == 2
        with torch.no_grad():
            on = pair.same(calls, lambda m: m(x))
            with pair.model.disable_adapter():
                off = pair.model(x)
        if x.numel():
            assert all(g.abs().max() > 0 for g in grads.values())
            assert (on - off).norm() > 0.05 * on.norm()

    @pytest.mark.parametrize("reentrant", (True, False))
    def test_checkpointing(self, calls, kind, reentrant):
        pair = Pair(net(kind))
        x = torch.randn(5, K)

        def run(m):
            m.zero_grad()
            leaf = x.clone().requires_grad_()
            y = checkpoint(m, leaf, use_reentrant=reentrant)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            return y.detach(), leaf.grad, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        pair.same(calls, run, rtol=1e-4, atol=1e-4)

    def test_steps_of_training(self, calls, kind):
        pair = Pair(net(kind))

        def run(m):
            optimizer = torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=0.01)
            losses = []
            for _ in range(3):
                x = torch.randn(16, K)
                loss = (m(x) - x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return losses

        losses = pair.same(calls, run, rtol=1e-4, atol=1e-4)
        assert len({float(loss) for loss in losses}) == 3

    def test_trained_base(self, calls, kind):
        pair = Pair(net(kind))
        pair.do(lambda m: up_of(m).base_layer.requires_grad_())
        grads = pair.same(calls, lambda m: trained(m, torch.randn(5, K)), rtol=1e-4, atol=1e-4)[2]
        assert len(grads) == 4

    def test_after_a_first_call_in_inference_mode(self, calls, kind):
        pair = Pair(net(kind, n=COUNT - 1))
        x = torch.randn(5, K)
        with torch.inference_mode():
            pair.same(calls, lambda m: m(x))
        pair.same(calls, lambda m: trained(m, x), rtol=1e-4, atol=1e-4)

    def test_conv1d(self, calls, kind):
        """Its weight is [K, N]."""
        pair = Pair(net(kind, base=Conv(), fan_in_fan_out=True))
        x = torch.randn(2, 3, K)
        before = pair.same(calls, lambda m: trained(m, x), rtol=1e-4, atol=1e-4)[0]
        pair.do(lambda m: m.merge_adapter())
        with torch.no_grad():
            close(pair.same(calls, lambda m: m(x), "adapters merged"), before, rtol=1e-4, atol=1e-4)


#: What PEFT's layer does with the base is up to the base.
BASES = {
    "hook": lambda base: add_hook(base),
    "class": lambda base: swap_class(base, Doubling),
    "fp32 result": lambda base: base.register_forward_hook(lambda m, args, y: y.float()),
    "fp64 result": lambda base: base.register_forward_hook(lambda m, args, y: y.double()),
    "tagged result": lambda base: setattr(base, "weight", tagged(base.weight)),
}


@EACH
@pytest.mark.parametrize("change", BASES)
def test_any_base(calls, kind, change):
    pair = Pair(net(kind))
    pair.do(lambda m: BASES[change](m.base_model.model.down.base_layer))
    x = torch.randn(5, K)
    y = pair.same(calls, lambda m: trained(m, x), rtol=1e-4, atol=1e-4)[0]
    assert type(y) is type(pair.twin(x).detach())
    assert calls.take() == (0, 0)
    assert pair.handle.report().fast == 2


def test_arguments_beyond_x_reach_the_base(calls):
    class Offset(nn.Linear):
        def forward(self, x, offset=0):
            return super().forward(x) + offset

    pair = Pair(net("fourier"))
    pair.do(lambda m: swap_class(up_of(m).base_layer, Offset))
    with torch.no_grad():
        pair.same(calls, lambda m: up_of(m)(torch.ones(4, K), offset=3), {"up": "fast"})
    for m in pair:
        with pytest.raises(TypeError, match="unexpected keyword argument 'shift'"):
            up_of(m)(torch.randn(4, K), shift=1)


@EACH
class TestLifecycle:
    def second(self, m, kind, **kwargs):
        m.add_adapter("other", config(kind, random_loc_seed=5, n=COUNT + 7, **kwargs))
        torch.manual_seed(11)
        for layer in (up_of(m), m.base_model.model.down):
            nn.init.normal_(values_of(layer, kind, "other"))
        return m.train()

    def test_adapters_in_turn_and_together(self, calls, kind):
        pair = Pair(net(kind))
        pair.do(lambda m: self.second(m, kind))
        x = torch.randn(5, K)
        outputs = []
        for names in ("default", "other", "default", ["default", "other"]):
            pair.do(lambda m, names=names: m.base_model.set_adapter(names))
            outputs.append(pair.same(calls, lambda m: trained(m, x), rtol=1e-4, atol=1e-4)[0])
        close(outputs[0], outputs[2])
        assert not torch.allclose(outputs[0], outputs[1])
        assert not torch.allclose(outputs[0], outputs[3])
        pair.do(lambda m: m.base_model.set_adapter("default"))
        pair.do(lambda m: m.delete_adapter("other"))
        close(pair.same(calls, lambda m: trained(m, x), rtol=1e-4, atol=1e-4)[0], outputs[0])
        pair.do(lambda m: self.second(m, kind))  # of the same name again
        pair.do(lambda m: m.set_adapter("other"))
        close(pair.same(calls, lambda m: trained(m, x), rtol=1e-4, atol=1e-4)[0], outputs[1])

    def test_several_are_rounded_once(self, calls, kind):
        pair = Pair(net(kind, dtype=torch.bfloat16))
        pair.do(lambda m: self.second(m, kind))
        pair.do(lambda m: m.base_model.set_adapter(["default", "other"]))
        x = torch.randn(64, K).bfloat16()
        up, twin = up_of(pair.model), up_of(pair.twin)
        with torch.no_grad():
            exact = twin.base_layer.double()(x.double())
            for name in ("default", "other"):
                exact += x.double() @ delta_weight(
                    values_of(twin, kind, name), places_of(twin, kind)[name], (N, K), kind,
                    150.0 if kind == "fourier" else 2.0,
                ).T  # fmt: skip
            twin.base_layer.bfloat16()
            assert_within_rule(up(x), exact, twin(x))
        assert calls.take() == (1, 0)

    def test_patch_again_takes_in_new_layers(self, calls, kind):
        pair = Pair(net(kind, targets=["up"]))
        pair.do(lambda m: self.second(m, kind))
        pair.do(lambda m: m.base_model.set_adapter(["default", "other"]))
        assert "not patched (call patch again)" in pair.handle.report().layers.values()
        pair.handle = lk.patch(pair.model, strict=True)
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("safe", (True, False))
    def test_disable_and_merge(self, calls, kind, safe):
        pair = Pair(net(kind).eval())
        pair.do(lambda m: self.second(m, kind).eval())
        x = torch.randn(5, K)
        with torch.no_grad():
            before = pair.same(calls, lambda m: m(x))

            def disabled(m):
                with m.disable_adapter():
                    return m(x)

            close(*(disabled(m) for m in pair))
            assert calls.take() == (0, 2)
            pair.do(lambda m: m.merge_adapter(safe_merge=safe, adapter_names=["default", "other"]))
            close(*(up_of(m).base_layer.weight for m in pair))
            merged = pair.same(calls, lambda m: m(x), "adapters merged", rtol=1e-4, atol=1e-4)
            assert not torch.allclose(merged, before)
            close(*(disabled(m) for m in pair), rtol=1e-4, atol=1e-4)  # which unmerges
            close(pair.same(calls, lambda m: m(x), rtol=1e-4, atol=1e-4), before, rtol=1e-4, atol=1e-4)
            unloaded = pair.do(lambda m: m.merge_and_unload()(x))
            close(unloaded, [before] * 2, rtol=1e-4, atol=1e-4)

    def test_save_and_load(self, calls, kind, tmp_path):
        pair = Pair(net(kind).eval())
        x = torch.randn(5, K)
        with torch.no_grad():
            before = pair.same(calls, lambda m: m(x))
        assert {n: t.shape for n, t in pair.model.state_dict().items()} == {
            n: t.shape for n, t in pair.twin.state_dict().items()
        }
        pair.model.save_pretrained(tmp_path)
        torch.manual_seed(3)
        again = PeftModel.from_pretrained(Net(), tmp_path).eval()
        assert lk.patch(again, strict=True).report().fast == 2
        with torch.no_grad():
            close(again(x), before)
            again.load_adapter(tmp_path, "second")
            again.set_adapter("second")
            close(again(x), before)
        assert calls.take() == (4, 0)

    def test_unpatch(self, calls, kind):
        model = net(kind)
        before = {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()}
        handle = lk.patch(model)
        assert all(type(layer) is not before[n][0] for n, layer in model.named_modules() if n.endswith(("up", "down")))
        model(torch.randn(5, K))
        assert calls.take() == (2, 0)
        assert "2 of 2 adapter layers fast" in str(handle.report())
        handle.unpatch()
        assert {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()} == before
        model(torch.randn(5, K))
        assert calls.take() == (0, 0)
        assert set(handle.report().layers.values()) == {"not patched (call patch again)"}

    def test_pickle_and_copy(self, calls, kind):
        pair = Pair(net(kind).eval())
        buffer = io.BytesIO(pickle.dumps(up_of(pair.model)))
        x = torch.randn(5, K)
        with torch.no_grad():
            for layer in (pickle.load(buffer), copy.deepcopy(up_of(pair.model))):
                close(layer(x), up_of(pair.twin)(x))
        assert calls.take() == (2, 0)

    def test_delta_weight(self, kind, monkeypatch):
        """As PEFT's, its gradient too, and not by PEFT's."""
        pair = Pair(net(kind))
        found, fast = [], []
        ours = _peft_spectral_layer.spectral_delta_weight
        monkeypatch.setattr(
            _peft_spectral_layer, "spectral_delta_weight", lambda *a, **k: fast.append(a) or ours(*a, **k)
        )
        for m in pair:
            delta = up_of(m).get_delta_weight("default")
            values = values_of(up_of(m), kind)
            weights = torch.linspace(-1, 1, delta.numel()).view(delta.shape)
            found.append((delta.detach(), *torch.autograd.grad((delta * weights).sum(), values)))
        close(found[1], found[0], rtol=1e-4, atol=1e-4)
        assert found[1][1].abs().max() > 0
        assert len(fast) == 1


@pytest.fixture
def made(monkeypatch):
    """Places of which something was made."""
    seen, plans = [], []
    make, plan = _peft_spectral._made, _peft_spectral.SpectralPlan
    monkeypatch.setattr(_peft_spectral, "_made", lambda *args: seen.append(args) or make(*args))
    monkeypatch.setattr(_peft_spectral, "SpectralPlan", lambda *a, **k: plans.append(a) or plan(*a, **k))
    return seen, plans


class Twice(nn.Module):
    """Four layers of two shapes."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Net(), Net()

    def forward(self, x):
        return self.two(self.one(x))


class TestPlans:
    def test_one_is_made_for_all_layers_of_a_shape_and_a_seed(self, calls, made):
        pair = Pair(net("haar", base=Twice(), random_loc_seed=31))
        x = torch.randn(5, K)
        for _ in range(3):
            pair.same(calls, lambda m: trained(m, x), rtol=1e-4, atol=1e-4)
        assert [len(these) for these in made] == [4, 2]
        copied = copy.deepcopy(pair.model)
        copied(x)
        assert [len(these) for these in made] == [8, 2]

    def test_it_is_forgotten_with_its_model(self):
        gc.collect()
        before = len(_peft_spectral._by_content), len(_peft_spectral._by_tensor)
        model = net("fourier", random_loc_seed=32)
        lk.patch(model)
        model(torch.randn(2, K))
        assert len(_peft_spectral._by_content) == before[0] + 2
        del model
        gc.collect()
        assert (len(_peft_spectral._by_content), len(_peft_spectral._by_tensor)) == before

    @pytest.mark.parametrize("how", ("in place", "by another", "by data"))
    def test_it_follows_its_places(self, calls, how):
        pair = Pair(net("fourier"))
        x = torch.randn(5, K)
        with torch.no_grad():
            before = pair.same(calls, lambda m: m(x))

            def move(m):
                held = places_of(up_of(m), "fourier")
                if how == "in place":
                    held["default"].copy_(held["default"].flip(1))
                elif how == "by another":
                    held["default"] = held["default"].flip(1)
                else:
                    held["default"].data = held["default"].flip(1)

            pair.do(move)
            assert not torch.allclose(pair.same(calls, lambda m: m(x)), before)

    def test_it_follows_its_layer_to_another_device(self, calls):
        pair = Pair(net("haar", bias=False))
        x = torch.randn(5, K)
        state = copy.deepcopy(pair.model.state_dict())
        with torch.no_grad():
            before = pair.same(calls, lambda m: m(x))
            pair.model.to("meta")
            layer = up_of(pair.model)
            found = _peft_spectral.spectrum_of(layer, _peft_spectral.tuner_of(type(layer)), "default")
            assert found.values.is_meta
            assert found.plan.device == found.values.device
            pair.model.to_empty(device="cpu").load_state_dict(state)
            assert torch.equal(pair.model(x), before)
        assert calls.take() == (2, 0)

    def test_nothing_of_it_is_in_the_model(self):
        model = net("haar")
        lk.patch(model)
        model(torch.randn(2, K))
        held = [value for m in model.modules() for value in m.__dict__.values()]
        assert not any(isinstance(value, lk.SpectralPlan) for value in held)
        assert not places_of(up_of(model), "haar")["default"].__dict__


def test_a_model_of_several_tuners(calls):
    """Each layer goes its own way."""
    from relatives import net as relative

    model = nn.Sequential(net("fourier"), relative("vera"), net("haar"))
    pair = Pair(stir(model))
    assert pair.handle.report().fast == 6
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)), rtol=1e-4, atol=1e-4)
    pair.handle.unpatch()
    assert [type(m) for m in model.modules()] == [type(m) for m in pair.twin.modules()]
