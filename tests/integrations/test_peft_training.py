"""Training a patched model: the same outputs, gradients and steps as its unpatched twin's, from the same seed."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from nets import LLAMA_LAYERS, TOKENS, K, N, Net, adapters, close, config, llama, trained, up_of  # noqa: E402
from peft import get_peft_model  # noqa: E402
from peft.helpers import disable_input_dtype_casting  # noqa: E402
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig  # noqa: E402
from seeded import BESIDE, Pair, SeededDropout, seed_dropout  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations.peft import FAST  # noqa: E402
from lora_kernels.testing.numerics import assert_within_rule  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]

#: What is expected to be fast; of the rest, a word of the reason.
AUTOCAST = FAST
CONV1D = FAST
LORA_BIAS = FAST
SEVERAL_WITH_DROPOUT = FAST
MIXED = FAST  # PEFT raises
MIXED_WITH_DROPOUT = FAST
BASE_WEIGHT_TRAINS = BESIDE

#: name -> (configuration, what is expected)
CONFIGURED = {
    "plain": ({}, FAST),
    "lora_bias": (dict(lora_bias=True), LORA_BIAS),
    "bias of the LoRA layers": (dict(bias="lora_only"), FAST),
    "all biases": (dict(bias="all"), FAST),
    "rsLoRA": (dict(use_rslora=True), FAST),
    "patterns": (dict(rank_pattern={"up": 7}, alpha_pattern={"down": 11}), FAST),
    "rank 1": (dict(r=1), FAST),
    "rank above the width": (dict(r=65), FAST),
    "orthogonal start": (dict(init_lora_weights="orthogonal"), FAST),
    "PiSSA": (dict(init_lora_weights="pissa"), FAST),
    "B of zeros": (dict(init_lora_weights=True), FAST),
}


def training(dropout=0.0, dtype=torch.float32, targets=("up", "down"), biased=True, **kwargs):
    """A small PEFT model in training mode; both of its linears have a bias if ``biased``."""
    base = Net(biased)
    if biased:
        base.down = nn.Linear(N, K)
    model = get_peft_model(base.to(dtype), config(lora_dropout=dropout, targets=targets, **kwargs)).train()
    for name, p in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(p)
    return model


def steps(model, count=4, **kwargs):
    """(loss of each step, parameters after the last) of a few steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for i in range(count):
        x = torch.linspace(-1, 1, 6 * K).roll(7 * i).view(2, 3, K)
        loss = (model(x, **kwargs) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class TestOneAdapter:
    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    @pytest.mark.parametrize("configured", CONFIGURED)
    def test_configured(self, calls, configured, dropout):
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(dropout, **kwargs))
        _, dx, grads = pair.same(calls, lambda m: trained(m, torch.randn(3, 5, K)), expected)
        trainable = {n for n, p in pair.model.named_parameters() if p.requires_grad}
        assert grads.keys() == trainable
        assert len(trainable) == 4 + 2 * ("bias" in configured)
        assert dx.count_nonzero() == dx.numel()

    @pytest.mark.parametrize("p", (0.01, 0.5, 0.99, 1.0))
    def test_dropout(self, calls, p):
        """The mask of each layer and call is its own; what is kept is scaled."""
        pair = Pair(training(p))
        x = torch.randn(64, K)
        first = pair.same(calls, lambda m: trained(m, x))
        second = pair.same(calls, lambda m: trained(m, x))
        assert torch.equal(first[0], second[0]) == (p == 1)
        pair.do(lambda m: m.eval())
        assert not torch.allclose(pair.same(calls, lambda m: trained(m, x))[0], first[0])

    def test_dropout_is_right_on_average(self, calls):
        """Against eval, without the twin: E[x̃] = x."""
        pair = Pair(training(0.5))
        layer, x = up_of(pair.model), torch.randn(1, K)
        with torch.no_grad():
            dropped = layer(x.expand(4096, K))
            assert calls.take() == (1, 0)
            close(dropped.mean(0, keepdim=True), layer.eval()(x), rtol=0, atol=6 * float(dropped.std(0).max()) / 64)

    def test_dropout_without_gradients(self, calls):
        pair = Pair(training(0.4))
        x = torch.randn(7, K)
        with torch.no_grad():
            trains = pair.same(calls, lambda m: m(x))
        with torch.inference_mode():
            pair.same(calls, lambda m: m(x))
            assert not torch.allclose(trains, pair.model.eval()(x))

    def test_dropout_changed_between_calls(self, calls):
        pair = Pair(training(0.4))
        x = torch.randn(7, K)
        for p in (0.1, 0.0, 0.8):
            pair.do(lambda m, p=p: setattr(up_of(m).lora_dropout.default, "p", p))
            pair.same(calls, lambda m: trained(m, x))
        pair.do(lambda m: up_of(m).lora_dropout.update({"default": nn.Identity()}))
        pair.same(calls, lambda m: trained(m, x))

    def test_only_the_dropout_is_in_training_mode(self, calls):
        """PEFT's plain LoRA asks the dropout module, not the layer."""
        pair = Pair(training(0.4))
        pair.do(lambda m: (m.eval(), up_of(m).lora_dropout.train()))
        x = torch.randn(7, K)
        a, b = (pair.same(calls, lambda m: m(x)) for _ in range(2))
        assert not torch.allclose(a, b)

    @pytest.mark.parametrize("shape", ((K,), (1, K), (2, 3, 2, K)))
    def test_every_shape(self, calls, shape):
        pair = Pair(training(0.4))
        x = torch.randn(shape)
        kept = x.clone()
        pair.same(calls, lambda m: trained(m, x))
        assert torch.equal(x, kept)

    @pytest.mark.parametrize("shape", ((0, K), (2, 0, K)))
    def test_no_rows(self, calls, shape):
        pair = Pair(training(0.4))

        def run(m):
            m.zero_grad()
            x = torch.randn(shape).requires_grad_()
            y = m(x)
            y.sum().backward()
            return y.detach(), x.grad, [p.grad for p in m.parameters() if p.grad is not None]

        assert len(pair.same(calls, run)[2]) == 4

    @pytest.mark.parametrize(
        "x",
        (
            lambda: torch.randn(K, 6).T,
            lambda: torch.randn(5, 4, K).transpose(0, 1),
            lambda: torch.randn(1, K).expand(6, K),
            lambda: torch.randn(6, 2 * K)[:, ::2],
        ),
    )
    def test_strided_inputs_and_gradients(self, calls, x):
        pair = Pair(training(0.4))
        x = x()

        def run(m):
            m.zero_grad()
            leaf = x.detach().requires_grad_()
            y = m(leaf)
            y.backward(torch.linspace(-1, 1, K).expand_as(y))
            return y.detach(), leaf.grad, [p.grad for p in m.parameters() if p.grad is not None]

        pair.same(calls, run)

    def test_x_without_grad(self, calls):
        """The first layer of a model: x is a batch, not an activation."""
        pair = Pair(training(0.4))
        x = torch.randn(5, K)

        def run(m):
            m.zero_grad()
            up_of(m)(x).square().sum().backward()
            return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        assert len(pair.same(calls, run)) == 2

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    @pytest.mark.parametrize("frozen", ("lora_A", "lora_B", "lora_"))
    def test_frozen_factors(self, calls, frozen, dropout):
        pair = Pair(training(dropout))
        pair.do(lambda m: [p.requires_grad_(False) for n, p in m.named_parameters() if frozen in n])
        grads = pair.same(calls, lambda m: trained(m, torch.randn(5, K)))[2]
        assert len(grads) == (0 if frozen == "lora_" else 2)

    def test_frozen_in_part_then_thawed(self, calls):
        pair = Pair(training(0.4))
        x = torch.randn(5, K)
        for grad in (False, True):
            pair.do(lambda m, grad=grad: up_of(m).lora_A.default.weight.requires_grad_(grad))
            assert len(pair.same(calls, lambda m: trained(m, x))[2]) == 3 + grad

    def test_trainable_base_weight(self, calls):
        pair = Pair(training(0.4))
        pair.do(lambda m: up_of(m).base_layer.weight.requires_grad_())
        expected = {"up": BASE_WEIGHT_TRAINS, "down": FAST}
        assert len(pair.same(calls, lambda m: trained(m, torch.randn(5, K)), expected)[2]) == 5

    def test_scaling_changed_between_steps(self, calls):
        pair = Pair(training(0.4))
        for change in (
            lambda up: up.set_scale("default", 3.0),
            lambda up: up.scale_layer(0.5),
            lambda up: up.unscale_layer(),
            lambda up: up.scaling.update(default=0),
            lambda up: up.scaling.update(default=-1.5),
        ):
            pair.do(lambda m, change=change: change(up_of(m)))
            pair.same(calls, lambda m: trained(m, torch.randn(5, K)))

    def test_scaling_changed_between_forward_and_backward(self, calls):
        def run(m):
            m.zero_grad()
            y = m(torch.randn(5, K))
            up_of(m).set_scale("default", 3.0)
            y.square().sum().backward()
            up_of(m).set_scale("default", 1.0)
            return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        Pair(training(0.4)).same(calls, run)

    def test_disabled_or_merged_draws_nothing(self, calls):
        pair = Pair(training(0.4))
        x = torch.randn(5, K)
        with pair.twin.disable_adapter(), pair.model.disable_adapter():
            assert pair.same(calls, lambda m: trained(m, x), "disabled")[2] == {}
        pair.do(lambda m: m.merge_adapter())
        assert pair.same(calls, lambda m: trained(m, x), "merged")[2] == {}
        pair.do(lambda m: m.unmerge_adapter())
        assert len(pair.same(calls, lambda m: trained(m, x))[2]) == 4

    def test_slow_layers_draw_what_peft_draws(self, calls):
        """A seed that is drawn and then not used would shift every later draw."""
        pair = Pair(training(0.4))
        pair.do(lambda m: up_of(m).lora_A.default.register_forward_hook(lambda *_: None))
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), {"up": "lora_A has hooks", "down": FAST})

    def test_dropout_of_another_kind(self, calls):
        pair = Pair(training(0.4))
        pair.do(lambda m: up_of(m).lora_dropout.update({"default": nn.AlphaDropout(0.4)}))
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), {"up": "dropout is AlphaDropout", "down": FAST})

    def test_meta_device(self, calls):
        """Shapes without values: PEFT's forward."""
        pair = Pair(training(0.4))
        pair.do(lambda m: m.to("meta"))
        y = pair.same(calls, lambda m: m(torch.randn(5, 3, K, device="meta")), "meta")
        assert (y.shape, y.device.type) == ((5, 3, K), "meta")

    def test_bad_input_raises_what_peft_raises(self):
        pair = Pair(training(0.4))
        for x in (torch.randn(4, K + 1), torch.randn(4, K).bfloat16(), torch.randint(9, (4, K))):
            messages = []
            for m in pair:
                with pytest.raises(RuntimeError) as error:
                    m(x)
                messages.append(str(error.value))
            assert messages[0] == messages[1]

    def test_gradients_accumulate(self, calls):
        pair = Pair(training(0.4))

        def run(m):
            m.zero_grad()
            for _ in range(3):
                m(torch.randn(5, K)).square().sum().backward()
            return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        pair.same(calls, run, rtol=1e-4)

    def test_gradient_hooks_see_the_gradients(self, calls):
        pair = Pair(training(0.4))

        def run(m):
            seen = []
            handles = [p.register_hook(lambda g: seen.append(g) or 2 * g) for p in m.parameters() if p.requires_grad]
            found = trained(m, torch.randn(5, K))
            for handle in handles:
                handle.remove()
            return found[2], sorted(float(g.norm()) for g in seen)

        assert len(pair.same(calls, run)[1]) == 4

    def test_input_dtype_casting_disabled(self, calls):
        pair = Pair(training(0.4))
        with disable_input_dtype_casting(pair.twin), disable_input_dtype_casting(pair.model):
            pair.same(calls, lambda m: trained(m, torch.randn(5, K)), "input dtype casting is disabled")


class TestPrecision:
    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    @pytest.mark.parametrize("masters", (True, False))
    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    def test_half_precision_is_no_less_exact_than_peft(self, calls, dtype, masters, dropout):
        """Of one layer, against the same in fp64: outputs, dx, and gradients in the factors' own dtype."""
        if not masters:
            model = get_peft_model(Net().to(dtype), config(lora_dropout=dropout), autocast_adapter_dtype=False).train()
        else:
            model = training(dropout, dtype)
        pair = Pair(model)
        assert pair.handle.report().fast == 2
        seed_dropout(pair.twin)
        exact = copy.deepcopy(pair.twin).double()
        x = torch.randn(512, K).to(dtype)
        found = []
        for m, data in ((exact, x.double()), (pair.twin, x), (pair.model, x)):
            torch.manual_seed(1)
            y, dx, grads = trained(up_of(m), data)
            found.append({"y": y, "dx": dx, **grads})
        assert calls.take() == (1, 0)
        truth, expected, actual = found
        assert actual.keys() == expected.keys()
        assert len(actual) == 4
        for name, t in truth.items():
            assert actual[name].dtype == expected[name].dtype
            noise = 1e-6 * float(t.norm()) / t.numel() ** 0.5
            assert_within_rule(actual[name], t, expected[name], noise=noise, what=name)

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    def test_autocast(self, calls, dtype, dropout):
        """A model in fp32 under autocast: products in half precision, gradients in fp32."""
        pair = Pair(training(dropout))
        seed_dropout(pair.twin)
        exact = copy.deepcopy(pair.twin).double()
        x = torch.randn(512, K)
        if AUTOCAST != FAST:
            with torch.autocast("cpu", dtype):
                pair.same(calls, lambda m: trained(m, x), AUTOCAST)
            return

        def run(m, x, enabled):
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            m.zero_grad()
            with torch.autocast("cpu", dtype, enabled=enabled):
                y = up_of(m)(leaf)
            (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            return {
                "y": y.detach(),
                "dx": leaf.grad,
                **{n: p.grad for n, p in m.named_parameters() if p.grad is not None},
            }

        truth, expected, actual = run(exact, x.double(), False), run(pair.twin, x, True), run(pair.model, x, True)
        assert calls.take() == (1, 0)
        with torch.autocast("cpu", dtype):
            assert pair.handle.report().fast == 2
        assert actual["y"].dtype == expected["y"].dtype == dtype
        assert actual.keys() == expected.keys()
        for name, t in truth.items():
            assert actual[name].dtype == expected[name].dtype
            assert (actual[name] - t).norm() <= 1.05 * (expected[name] - t).norm() + 1e-6 * t.norm(), name

    def test_autocast_of_a_whole_model(self, calls):
        """A loss as training loops compute it: forward under autocast, backward outside, three steps."""
        pair = Pair(training(0.1))

        def run(m):
            optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05)
            losses = []
            for _ in range(3):
                x = torch.randn(16, K)
                with torch.autocast("cpu", torch.bfloat16):
                    y = m(x)
                    assert y.dtype == torch.bfloat16
                    loss = (y - x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return losses

        with torch.autocast("cpu", torch.bfloat16):  # so that it is reported of
            pair.same(calls, run, AUTOCAST, rtol=0.02, atol=0.02)

    def test_autocast_with_masters_over_a_bf16_base(self, calls):
        pair = Pair(training(dtype=torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            y, dx, grads = pair.same(calls, lambda m: trained(m, torch.randn(64, K).bfloat16()), AUTOCAST,
                                     rtol=0.03, atol=0.3)  # fmt: skip
        assert y.dtype == dx.dtype == torch.bfloat16
        assert {g.dtype for g in grads.values()} == {torch.float32}

    def test_autocast_disabled_inside(self, calls):
        pair = Pair(training(0.4))
        x = torch.randn(5, K)
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            assert pair.same(calls, lambda m: trained(m, x))[0].dtype == torch.float32


class TestConv1D:
    """``fan_in_fan_out``: the base weight is [K, N]."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = Conv1D(N, K), Conv1D(K, N)
            nn.init.normal_(self.up.bias)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    def model(self, **kwargs):
        torch.manual_seed(2)
        return get_peft_model(self.Net(), config(fan_in_fan_out=True, **kwargs)).train()

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    def test_outputs_and_gradients(self, calls, dropout):
        pair = Pair(self.model(lora_dropout=dropout))
        x = torch.randn(3, 5, K)
        assert len(pair.same(calls, lambda m: trained(m, x), CONV1D)[2]) == 4
        pair.do(lambda m: m.eval())
        with torch.no_grad():
            pair.same(calls, lambda m: m(x), CONV1D)

    def test_mixed_batch(self, calls):
        model = self.model()
        model.add_adapter("other", config(r=2, fan_in_fan_out=True))
        pair = Pair(model.eval())
        x, names = torch.randn(4, 3, K), ["default", "other", "__base__", "other"]
        with torch.no_grad():
            mixed = pair.same(calls, lambda m: m(x, adapter_names=names), CONV1D)
            assert not torch.allclose(mixed, pair.model(x))

    def test_merged_and_unmerged(self, calls):
        pair = Pair(self.model())
        x = torch.randn(5, K)
        pair.do(lambda m: m.merge_adapter(safe_merge=True))
        pair.same(calls, lambda m: m(x), "merged")
        pair.do(lambda m: m.unmerge_adapter())
        pair.same(calls, lambda m: trained(m, x), CONV1D)

    def test_gpt2(self, calls):
        settings = transformers.GPT2Config(
            vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        targets = ("c_attn", "c_proj", "c_fc")
        model = get_peft_model(
            transformers.GPT2LMHeadModel(settings),
            config(targets=targets, fan_in_fan_out=True, lora_dropout=0.1, bias="lora_only"),
        ).train()

        def run(m):
            m.zero_grad()
            loss = m(TOKENS, labels=TOKENS).loss
            loss.backward()
            return loss.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        assert len(Pair(model).same(calls, run, CONV1D)[1]) == 8 * 3


class TestSeveralActive:
    @pytest.mark.parametrize("dropouts", ((0.0, 0.0, 0.0), (0.4, 0.0, 0.2), (0.3, 0.3, 0.3)))
    def test_sum_of_adapters(self, calls, dropouts):
        model = training(dropouts[0])
        model.add_adapter("low", config(r=1, lora_alpha=3, lora_dropout=dropouts[1]))
        model.add_adapter("wide", config(r=9, lora_dropout=dropouts[2], use_rslora=True))
        model.base_model.set_adapter(["default", "low", "wide"])
        pair = Pair(model.train())
        expected = SEVERAL_WITH_DROPOUT if any(dropouts) else FAST
        grads = pair.same(calls, lambda m: trained(m, torch.randn(3, 5, K)), expected)[2]
        assert len(grads) == 12

    def test_bias_and_frozen_ones_among_them(self, calls):
        model = training(lora_bias=True)
        model.add_adapter("plain", config(r=3))
        model.add_adapter("biased", config(r=2, lora_alpha=7, lora_bias=True))
        nn.init.normal_(up_of(model).lora_B.biased.bias)
        model.base_model.set_adapter(["default", "plain", "biased"])
        pair = Pair(model.train())
        pair.do(lambda m: [p.requires_grad_(False) for n, p in m.named_parameters() if "plain" in n])
        assert len(pair.same(calls, lambda m: trained(m, torch.randn(5, K)), LORA_BIAS)[2]) == 2 * 6

    def test_switching_between_steps(self, calls):
        pair = Pair(adapters(training(0.4)).train())
        for active in ("low", ["low", "default"], "pattern", "default"):
            pair.do(lambda m, active=active: m.base_model.set_adapter(active))
            several = SEVERAL_WITH_DROPOUT if isinstance(active, list) else FAST
            grads = pair.same(calls, lambda m: trained(m, torch.randn(5, K)), several)[2]
            assert len(grads) == 4 * (2 if isinstance(active, list) else 1)

    def test_one_with_dropout_among_them_is_not_lost_in_eval(self, calls):
        model = training(0.4)
        model.add_adapter("low", config(r=1))
        model.base_model.set_adapter(["default", "low"])
        pair = Pair(model.eval())
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)))


class TestMixedBatch:
    """PEFT forbids ``adapter_names`` in training; what a mixed batch must give is what its samples give one by one."""

    NAMES = ("default", "low", "__base__", "pattern", "low")

    def one_by_one(self, twin, x):
        """(output, dx, gradients) of each sample with its adapter alone."""
        for name, p in twin.named_parameters():
            p.requires_grad_("lora_" in name)
        twin.zero_grad()
        leaf, ys = x.clone().requires_grad_(), []
        for name, row in zip(self.NAMES, leaf, strict=True):
            twin.base_model.enable_adapter_layers()
            if name == "__base__":
                with twin.disable_adapter():
                    ys.append(twin(row[None]))
            else:
                twin.base_model.set_adapter(name)
                for n, p in twin.named_parameters():
                    p.requires_grad_("lora_" in n)
                ys.append(twin(row[None]))
        y = torch.cat(ys)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        return y.detach(), leaf.grad, {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}

    def test_gradients_are_those_of_its_samples(self, calls):
        pair = Pair(adapters(training()).train())
        for name, p in pair.model.named_parameters():
            p.requires_grad_("lora_" in name)
        x = torch.randn(len(self.NAMES), 3, K)
        if MIXED != FAST:
            with pytest.raises(ValueError, match=MIXED):
                pair.model(x, adapter_names=list(self.NAMES))
            return
        actual = trained(pair.model, x, adapter_names=list(self.NAMES))
        assert calls.take() == (2, 0)
        expected = self.one_by_one(pair.twin, x)
        close(actual[:2], expected[:2])
        for name, grad in actual[2].items():
            close(grad, expected[2].get(name, torch.zeros_like(grad)))
        assert expected[2].keys() <= actual[2].keys()
        assert {name.split(".")[-2] for name in expected[2]} == {"default", "low", "pattern"}

    def test_with_dropout(self, calls):
        """One mask for the batch's rows: of one layer, that is the base of x and the adapters of x̃."""
        model = training(0.5)
        model.add_adapter("low", config(r=1, lora_alpha=3, lora_dropout=0.5))
        pair = Pair(model.train())
        x, names = torch.randn(3, 7, K), ["default", "low", "__base__"]
        if MIXED_WITH_DROPOUT != FAST:
            with pytest.raises(ValueError, match=MIXED_WITH_DROPOUT):
                pair.model(x, adapter_names=names)
            return
        found = []
        for layer in map(up_of, pair):
            for factors in (layer.lora_A, layer.lora_B):
                factors.requires_grad_()
            layer.zero_grad()
            torch.manual_seed(3)
            leaf = x.clone().requires_grad_()
            if layer is up_of(pair.model):
                y = layer(leaf, adapter_names=names)
            else:
                dropped = SeededDropout(0.5)(leaf)
                layer.eval()
                y = layer.base_layer(leaf) + layer(dropped, adapter_names=names) - layer.base_layer(dropped)
            y.square().sum().backward()
            found.append(
                (y.detach(), leaf.grad, {n: p.grad for n, p in layer.named_parameters() if p.grad is not None})
            )
        assert calls.take() == (1, 0)
        close(found[1], found[0], rtol=1e-4, atol=1e-4)
        assert len(found[0][2]) == 4

    def test_adapters_of_different_dropout(self, calls):
        """PEFT's forward, which drops as torch does."""
        model = training(0.5)
        model.add_adapter("low", config(r=1, lora_alpha=3))
        pair = Pair(model.train())
        x, names = torch.randn(3, 7, K), ["default", "low", "__base__"]
        states = []
        for m in pair:
            torch.manual_seed(3)
            states.append((up_of(m)(x, adapter_names=names), torch.get_rng_state()))
        close(*states)
        assert calls.take() == (0, 1)

    def test_steps(self, calls):
        """Two adapters trained at once reach what each reaches alone."""
        if MIXED != FAST:
            pytest.skip("PEFT raises")
        model = training()
        model.add_adapter("low", config(r=1, lora_alpha=3))
        pair = Pair(model.train())
        x = torch.randn(4, 3, K)
        runs = [(pair.model, ["default", "low"], ["default", "default", "low", "low"], x)]
        runs += [
            (copy.deepcopy(pair.twin), [name], None, part)
            for name, part in zip(("default", "low"), x.split(2), strict=True)
        ]
        found = {}
        for m, active, names, data in runs:
            m.base_model.set_adapter(active)
            optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-4)
            for _ in range(3):
                optimizer.zero_grad()
                y = m(data) if names is None else m(data, adapter_names=names)
                (y - data).square().sum().backward()
                optimizer.step()
            trainable = {n: p.detach() for n, p in m.named_parameters() if p.requires_grad}
            if names is None:
                close({n: found[n] for n in trainable}, trainable, rtol=1e-4)
            found.update(trainable)
        assert calls.take() == (6, 0)


class TestVariants:
    """What PEFT computes in its own way stays PEFT's, in training and in eval."""

    @pytest.mark.parametrize("train", (True, False))
    @pytest.mark.parametrize(
        ("kwargs", "reason"),
        (
            (dict(velora_config=VeloraConfig(num_groups=4, init_type="batch_average")), "Velora variant"),
            (dict(use_bdlora=BdLoraConfig(["up"], ["down"], nblocks=2)), "BdLora variant"),
            (dict(monteclora_config=MontecloraConfig()), "Monteclora variant"),
            (dict(task_type="CAUSAL_LM", alora_invocation_tokens=[1]), "ALora variant"),
        ),
        ids=lambda value: value.split()[0] if isinstance(value, str) else "",
    )
    def test_own_forward(self, calls, kwargs, reason, train):
        torch.manual_seed(2)
        kwargs = {"lora_dropout": 0.0, **kwargs}
        base = Net()
        base.prepare_inputs_for_generation = None
        model = get_peft_model(base, config(**{"init_lora_weights": True, **kwargs})).train(train)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
        pair = Pair(model)
        x = torch.randn(3, 5, K)
        pair.same(calls, lambda m: trained(m.base_model.model, x), reason)

    def test_alora_offsets(self, calls):
        base = Net()
        base.prepare_inputs_for_generation = None
        model = get_peft_model(base, config(task_type="CAUSAL_LM", alora_invocation_tokens=[1]))
        pair = Pair(model.train())
        x = torch.randn(3, 5, K)
        kwargs = dict(alora_offsets=[2, None, 5])
        wanted, found = (trained(up_of(m), x, **kwargs) for m in pair)
        close(found, wanted)
        assert not torch.allclose(found[0], up_of(pair.model)(x))


class TestSteps:
    """Losses and parameters after several steps of an optimizer."""

    @pytest.mark.parametrize("kwargs", ({}, dict(lora_bias=True), dict(bias="all"), dict(use_rslora=True)))
    def test_losses_are_the_twins(self, calls, kwargs):
        pair = Pair(training(0.2, **kwargs))
        losses, _ = pair.same(calls, steps, LORA_BIAS if "lora_bias" in kwargs else FAST, rtol=2e-4, atol=2e-4)
        assert len({float(loss) for loss in losses}) == len(losses)

    @pytest.mark.parametrize("dropout", (0.0, 0.1))
    def test_llama(self, calls, dropout):
        model = llama()
        model.base_model.set_adapter(["default", "two"] if not dropout else "default")
        pair = Pair(model.train())
        if dropout:
            pair.do(lambda m: [layer.lora_dropout.update({"default": nn.Dropout(dropout)}) for layer in m.modules()
                               if hasattr(layer, "lora_dropout")])  # fmt: skip

        def run(m):
            optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01)
            losses = []
            for _ in range(4):
                optimizer.zero_grad()
                loss = m(TOKENS, labels=TOKENS).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.detach())
            return losses

        losses = pair.same(calls, run, rtol=1e-4, atol=1e-4)
        assert len({float(loss) for loss in losses}) == 4
        assert pair.handle.report().fast == LLAMA_LAYERS

    def test_unpatched_in_between(self, calls):
        pair = Pair(training(0.2))
        pair.same(calls, steps, rtol=2e-4, atol=2e-4)
        pair.handle.unpatch()
        seed_dropout(pair.twin, ())
        wanted, found = pair.do(steps)
        close(found, wanted, rtol=2e-4, atol=2e-4)
        assert calls.take() == (0, 0)
        pair.handle = lk.patch(pair.model)
        pair.same(calls, steps, rtol=2e-4, atol=2e-4)

    def test_patching_says_nothing(self, caplog):
        with warnings.catch_warnings(), caplog.at_level("WARNING", "lora_kernels"):
            warnings.simplefilter("error")
            model = training(0.2)
            lk.patch(model, strict=True)
            model(torch.randn(4, K)).sum().backward()
        assert not caplog.records


def test_the_twins_dropout_is_torchs_in_all_but_the_numbers():
    """The helper: eval and p = 0 leave x alone, in training x is kept or 0, scaled, and its gradient likewise."""
    x = torch.randn(64, K, requires_grad=True)
    layer = SeededDropout(0.25)
    assert layer.eval()(x) is x
    assert SeededDropout(0.0)(x) is x
    y = layer.train()(x)
    kept = y != 0
    close(y, torch.where(kept, x / 0.75, 0))
    assert 0.6 < kept.float().mean() < 0.9
    y.sum().backward()
    close(x.grad, kept / 0.75)
