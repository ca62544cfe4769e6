"""DoRA, y = c∘(x Wᵀ + s v Bᵀ) + b with c = m / ‖W + s B A‖ detached, as PEFT computes it, in training and in eval."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from nets import K, N, Net, close, config, trained, up_of  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import dora  # noqa: E402
from seeded import Pair, seed_dropout  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations.peft import FAST  # noqa: E402
from lora_kernels.testing.numerics import assert_within_rule  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]

#: What is expected to be fast; of the rest, a word of the reason.
DORA = FAST
WITH_DROPOUT = FAST
CONV1D = FAST
SEVERAL = "DoRA beside other active adapters"
CACHED = FAST


def dora_net(dropout=0.0, bias=True, dtype=torch.float32, base=None, **kwargs):
    """A small PEFT model in training mode whose magnitudes are not the norms they started as."""
    torch.manual_seed(3)
    if base is None:
        base = Net(bias)
    model = get_peft_model(base.to(dtype), config(use_dora=True, lora_dropout=dropout, **kwargs)).train()
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data.mul_(0.5 + torch.rand_like(p))
    return model


def expected(dropout):
    return WITH_DROPOUT if dropout else DORA


def magnitude(model):
    return up_of(model).lora_magnitude_vector.default.weight


class TestGradients:
    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    @pytest.mark.parametrize("bias", (True, False))
    @pytest.mark.parametrize("shape", ((1, K), (4, K), (2, 3, K)))
    def test_outputs_and_gradients(self, calls, shape, bias, dropout):
        pair = Pair(dora_net(dropout, bias))
        x = torch.randn(shape)
        grads = pair.same(calls, lambda m: trained(m, x), expected(dropout))[2]
        assert len(grads) == 6
        assert sum("magnitude" in name for name in grads) == 2
        pair.do(lambda m: m.eval())
        pair.same(calls, lambda m: trained(m, x), DORA)
        with torch.no_grad():
            pair.same(calls, lambda m: m(x), DORA)

    def test_one_row_without_a_dimension(self, calls):
        """PEFT's DoRA makes [1, N] of [K], and so it is left to it."""
        model = dora_net()
        twin = copy.deepcopy(model)
        lk.patch(model)
        x = torch.randn(K)
        assert torch.equal(up_of(model)(x), up_of(twin)(x))
        assert calls.take() == (0, 1)

    def test_is_not_plain_lora(self, calls):
        """The magnitudes of these models tell."""
        pair = Pair(dora_net())
        x = torch.randn(4, K)
        before = pair.same(calls, lambda m: m(x).detach(), DORA)
        pair.do(lambda m: magnitude(m).data.mul_(1.5))
        assert not torch.allclose(pair.same(calls, lambda m: m(x).detach(), DORA), before)

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    def test_no_rows(self, calls, dropout):
        pair = Pair(dora_net(dropout))

        def run(m):
            m.zero_grad()
            y = m(torch.randn(0, K))
            y.sum().backward()
            return y.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        assert len(pair.same(calls, run, expected(dropout))[1]) == 6

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    @pytest.mark.parametrize("frozen", ("magnitude", "lora_A", "lora_B", "lora_"))
    def test_frozen_parts(self, calls, frozen, dropout):
        pair = Pair(dora_net(dropout))
        pair.do(lambda m: [p.requires_grad_(False) for n, p in m.named_parameters() if frozen in n])
        grads = pair.same(calls, lambda m: trained(m, torch.randn(5, K)), expected(dropout))[2]
        assert len(grads) == (0 if frozen == "lora_" else 4)

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    def test_trainable_base_bias(self, calls, dropout):
        """The bias stands outside of what the magnitude scales: its gradient is Σ dy."""
        pair = Pair(dora_net(dropout))
        pair.do(lambda m: up_of(m).base_layer.bias.requires_grad_())
        grads = pair.same(calls, lambda m: trained(m, torch.randn(5, K)), expected(dropout))[2]
        assert len(grads) == 7

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    def test_x_without_grad(self, calls, dropout):
        pair = Pair(dora_net(dropout))

        def run(m):
            x = torch.randn(5, K)
            m.zero_grad()
            up_of(m)(x).square().sum().backward()
            return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        assert len(pair.same(calls, run, expected(dropout))) == 3

    @pytest.mark.parametrize("layer", (False, True))
    @pytest.mark.parametrize("dropout", (False, True))
    def test_modes_of_the_layer_and_its_dropout(self, calls, layer, dropout):
        """PEFT drops where both are in training mode."""
        pair = Pair(dora_net(0.4))
        pair.do(lambda m: (up_of(m).train(layer), up_of(m).lora_dropout.train(dropout)))
        before = torch.get_rng_state()
        pair.same(calls, lambda m: trained(up_of(m), torch.ones(5, K)), DORA)
        assert torch.equal(torch.get_rng_state(), before) != (layer and dropout)

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    @pytest.mark.parametrize("value", (0.0, -1.25))
    def test_magnitude_of_zero_and_below(self, calls, value, dropout):
        """Where c = 0 nothing of z is left in y, and the magnitude's gradient, Σ dy∘z / n, still is what it is."""
        pair = Pair(dora_net(dropout))
        pair.do(lambda m: magnitude(m).data[2:5].fill_(value))
        grads = pair.same(calls, lambda m: trained(up_of(m), torch.randn(5, K)), expected(dropout))[2]
        grad = next(g for n, g in grads.items() if "magnitude" in n)
        assert grad[2:5].count_nonzero() == 3

    def test_output_changed_in_place(self, calls):
        """The output is kept for the magnitude's gradient, and torch says so rather than give a wrong one."""
        model = dora_net()
        lk.patch(model)
        y = relu(up_of(model)(torch.randn(5, K)).mul_(1.5), inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.square().sum().backward()
        assert calls.take() == (1, 0)

    def test_output_changed_in_place_under_dropout(self, calls):
        """There the base product is made again."""
        pair = Pair(dora_net(dropout := 0.4))

        def run(m):
            x = torch.randn(5, K)
            m.zero_grad()
            y = relu(up_of(m)(x).mul_(1.5), inplace=True)
            y.square().sum().backward()
            return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        assert len(pair.same(calls, run, expected(dropout))) == 3

    def test_norm_is_a_constant_to_the_gradient(self, calls):
        """dA without ∂c/∂A: with x = 0 in all but the norm, A and B have no gradient."""
        pair = Pair(dora_net())
        grads = pair.same(calls, lambda m: trained(up_of(m), torch.zeros(5, K)), DORA)[2]
        assert not any(g.any() for n, g in grads.items() if "magnitude" not in n)

    def test_backward_twice(self, calls):
        pair = Pair(dora_net(0.4))

        def run(m):
            x = torch.randn(5, K)
            loss, found = m(x).square().sum(), []
            for retain in (True, False):
                m.zero_grad()
                loss.backward(retain_graph=retain)
                found.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
            return found

        first, second = pair.same(calls, run, WITH_DROPOUT)
        assert all(map(torch.equal, first, second))

    @pytest.mark.parametrize("scale", (0.0, 0.25, -2))
    def test_scaling_is_in_the_norm(self, calls, scale):
        pair = Pair(dora_net(0.4))
        pair.do(lambda m: up_of(m).set_scale("default", scale))
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), WITH_DROPOUT)

    @pytest.mark.parametrize("use_rslora", (True, False))
    @pytest.mark.parametrize("r", (1, 7, 33))
    def test_ranks(self, calls, r, use_rslora):
        pair = Pair(dora_net(0.4, r=r, use_rslora=use_rslora))
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), WITH_DROPOUT)


class TestPrecision:
    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    def test_bf16_is_no_less_exact_than_peft(self, calls, dropout):
        pair = Pair(dora_net(dropout, dtype=torch.bfloat16))
        layers = pair.handle.report().layers
        fast = {reason == FAST for reason in layers.values()} == {True}
        assert fast == (expected(dropout) == FAST)
        if not fast:
            pair.same(calls, lambda m: trained(m, torch.randn(64, K).bfloat16()), expected(dropout))
            return
        seed_dropout(pair.twin)
        exact, x = copy.deepcopy(pair.twin).double(), torch.randn(512, K).bfloat16()
        found = []
        for m, data in ((exact, x.double()), (pair.twin, x), (pair.model, x)):
            torch.manual_seed(1)
            y, dx, grads = trained(up_of(m), data)
            found.append({"y": y, "dx": dx, **grads})
        assert calls.take() == (1, 0)
        truth, plain, actual = found
        assert len(actual) == 5
        for name, t in truth.items():
            assert actual[name].dtype == plain[name].dtype
            noise = 1e-6 * float(t.norm()) / t.numel() ** 0.5
            if "magnitude" in name:
                # PEFT keeps a product, or makes one in fp32; ours is read off y, or makes the base product again.
                noise = max(noise, 2 * float((plain[name] - t).square().mean().sqrt()))
            assert_within_rule(actual[name], t, plain[name], noise=noise, what=name)

    def test_fp64_stays_peft(self, calls):
        pair = Pair(dora_net(dtype=torch.float64).double())
        pair.same(calls, lambda m: trained(m, torch.randn(5, K).double()), "float64")


class TestSteps:
    @pytest.mark.parametrize("dropout", (0.0, 0.3))
    def test_losses_are_the_twins(self, calls, dropout):
        """The norm follows the factors from step to step."""
        pair = Pair(dora_net(dropout))

        def run(m):
            optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.03)
            losses = []
            for _ in range(4):
                x = torch.randn(6, K)
                loss = (m(x) - x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return losses, magnitude(m).detach().clone()

        losses, _ = pair.same(calls, run, expected(dropout), rtol=2e-4, atol=2e-4)
        assert len({float(loss) for loss in losses}) == 4

    def test_eval_between_steps_sees_the_new_norm(self, calls):
        pair = Pair(dora_net())
        x = torch.randn(5, K)
        for factor in (1.0, 3.0, -0.5):
            pair.do(lambda m, factor=factor: up_of(m).lora_B.default.weight.data.mul_(factor))
            pair.do(lambda m: m.eval())
            with torch.no_grad():
                pair.same(calls, lambda m: m(x), DORA)
            pair.do(lambda m: m.train())
            pair.same(calls, lambda m: trained(m, x), DORA)

    @pytest.mark.parametrize(
        "change",
        (
            lambda up: up.base_layer.weight.detach().mul_(2),
            lambda up: setattr(up.base_layer, "weight", nn.Parameter(torch.ones(N, K), requires_grad=False)),
            lambda up: setattr(up.lora_magnitude_vector.default, "weight", nn.Parameter(torch.full((N,), 0.5))),
            lambda up: up.lora_A.default.weight.data.add_(1),
        ),
    )
    def test_changes_after_a_call_are_seen(self, calls, change):
        pair = Pair(dora_net().eval())
        x = torch.randn(5, K)
        with torch.no_grad():
            before = pair.same(calls, lambda m: m(x), DORA)
            pair.do(lambda m: change(up_of(m)))
            assert not torch.allclose(pair.same(calls, lambda m: m(x), DORA), before)

    def test_a_hook_on_the_magnitude_runs(self, calls):
        pair = Pair(dora_net())
        pair.do(lambda m: up_of(m).lora_magnitude_vector.default.register_forward_hook(lambda m, args, y: y * 2))
        slow = "hooks" if DORA == FAST else DORA
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), {"up": slow, "down": DORA})


class TestState:
    def test_merged_unmerged_disabled(self, calls):
        pair = Pair(dora_net().eval())
        x = torch.randn(5, K)
        before = pair.same(calls, lambda m: m(x).detach(), DORA)
        for safe in (False, True):
            pair.do(lambda m, safe=safe: m.merge_adapter(safe_merge=safe))
            close(pair.same(calls, lambda m: m(x).detach(), "merged"), before, rtol=1e-4, atol=1e-4)
            pair.do(lambda m: m.unmerge_adapter())
            close(pair.same(calls, lambda m: trained(m, x), DORA)[0], before, rtol=1e-4, atol=1e-4)
        with pair.twin.disable_adapter(), pair.model.disable_adapter():
            assert not torch.allclose(pair.same(calls, lambda m: m(x).detach(), "disabled"), before)
        pair.same(calls, lambda m: trained(m, x), DORA)

    def test_merging_another_adapter_leaves_the_weight_rounded(self, calls):
        """In place and without a new version: the norms are of what is left."""
        model = dora_net()
        model.add_adapter("huge", config(r=2))
        for name, p in model.named_parameters():
            if "huge" in name:
                p.data.mul_(3000)
        pair = Pair(model.eval())
        x = torch.randn(5, K)
        before = pair.same(calls, lambda m: m(x).detach(), DORA)
        pair.do(lambda m: (m.merge_adapter(["huge"]), m.unmerge_adapter()))
        assert not torch.allclose(pair.same(calls, lambda m: m(x).detach(), DORA), before, rtol=1e-4, atol=1e-4)

    def test_merge_and_unload(self, calls):
        pair = Pair(dora_net())
        x = torch.randn(5, K)
        before = pair.same(calls, lambda m: m(x).detach(), DORA)
        wanted, found = pair.do(lambda m: m.merge_and_unload())
        assert type(found.up) is nn.Linear
        assert torch.equal(found(x), wanted(x))
        close(found(x), before, rtol=1e-4, atol=1e-4)

    def test_saved_and_loaded(self, calls, tmp_path):
        pair = Pair(dora_net())
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), DORA)
        assert pair.model.state_dict().keys() == pair.twin.state_dict().keys()
        pair.model.save_pretrained(tmp_path)
        torch.manual_seed(3)
        loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True).train()
        x = torch.randn(5, K)
        close(trained(loaded, x), trained(pair.twin, x))
        pair = Pair(loaded)
        pair.same(calls, lambda m: trained(m, x), DORA)

    def test_beside_plain_adapters(self, calls):
        model = dora_net()
        model.add_adapter("plain", config(r=3))
        pair = Pair(model.train())
        for active, reason in (("plain", FAST), ("default", DORA), (["default", "plain"], SEVERAL),
                               (["plain", "default"], SEVERAL)):  # fmt: skip
            pair.do(lambda m, active=active: m.base_model.set_adapter(active))
            pair.same(calls, lambda m: trained(m, torch.randn(5, K)), reason)

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    def test_two_at_once(self, calls, dropout):
        model = dora_net(dropout)
        model.add_adapter("second", config(r=2, use_dora=True))
        model.base_model.set_adapter(["default", "second"])
        pair = Pair(model.train())
        grads = pair.same(calls, lambda m: trained(m, torch.randn(5, K)), SEVERAL)[2]
        assert len(grads) == 12

    def test_mixed_batch_is_peft_s_to_refuse(self, calls):
        pair = Pair(dora_net().eval())
        for m in pair:
            with pytest.raises(ValueError, match="when DoRA is enabled"):
                m(torch.randn(2, K), adapter_names=["default", "__base__"])

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    def test_conv1d(self, calls, dropout):
        class ConvNet(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = Conv1D(N, K), nn.Linear(N, K)
                nn.init.normal_(self.up.bias)

            def forward(self, x):
                return self.down(torch.relu(self.up(x)))

        torch.manual_seed(3)
        pair = Pair(dora_net(dropout, base=ConvNet(), targets=("up",), fan_in_fan_out=True))
        x = torch.randn(5, K)
        pair.same(calls, lambda m: trained(m, x), CONV1D)
        pair.do(lambda m: m.eval())
        pair.same(calls, lambda m: trained(m, x), CONV1D)

    def test_pefts_cache_of_the_norm(self, calls, monkeypatch):
        """PEFT's opt-in, for eval: the same while nothing changes."""
        monkeypatch.setattr(dora, "ENABLE_DORA_CACHING", True)
        pair = Pair(dora_net().eval())
        for _ in range(2):
            with torch.no_grad():
                pair.same(calls, lambda m: m(torch.randn(5, K)), CACHED)
