"""What is done to a model before, between and after training steps: copies, files, adapters, merges, other bases."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
hooks = pytest.importorskip("accelerate.hooks")

from accelerate import cpu_offload, dispatch_model  # noqa: E402
from nets import TOKENS, Doubling, K, N, Net, adapters, both, close, config, swap_class, trained, up_of  # noqa: E402
from peft import IA3Config, PeftModel, get_peft_model, get_peft_model_state_dict  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap  # noqa: E402
from seeded import BESIDE, Pair  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations.peft import FAST  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("a_backend")]

#: name -> (configuration, what is expected: FAST, or a word of the reason)
CONFIGURED = {
    "plain": (dict(lora_dropout=0.3), FAST),
    "bias": (dict(lora_bias=True, lora_dropout=0.3), FAST),
    "DoRA": (dict(use_dora=True), FAST),
    "patterns": (dict(rank_pattern={"up": 7}, alpha_pattern={"down": 11}, use_rslora=True), FAST),
}
#: A base layer whose own forward must run.
OWN_FORWARD = HOOKED_BASE = OVER_ANOTHER_TUNER = BESIDE
DORA_OVER_OWN_FORWARD = "DoRA needs a plain base"
DISPATCHED = "forward"  # hooks on every module
OFFLOADED = "forward"
TENSOR_SCALING = "scaling is a Tensor"


def training(**kwargs):
    torch.manual_seed(4)
    base = Net()
    base.down = nn.Linear(N, K)
    model = get_peft_model(base, config(**kwargs)).train()
    for name, p in model.named_parameters():
        if "magnitude" in name or (name.endswith("bias") and "lora_B" in name):
            p.data.mul_(0.5).add_(torch.rand_like(p))
    return model


def step(model):
    """One step of SGD on random data; the loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x = torch.randn(6, K)
    loss = (model(x) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def steps_and_state(model):
    return [step(model) for _ in range(2)], state(model)


@pytest.mark.parametrize("configured", CONFIGURED)
class TestCopies:
    @pytest.mark.parametrize("clone", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
    def test_deepcopy_and_pickle_after_a_step(self, calls, configured, clone):
        """The copy trains on by itself, and stays fast."""
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))
        pair.same(calls, step, expected)
        before = state(pair.model)
        other = Pair.__new__(Pair)
        other.twin, other.model = copy.deepcopy(pair.twin), clone(pair.model)
        other.handle = lk.patch(other.model)
        assert type(up_of(other.model)) is type(up_of(pair.model))
        other.same(calls, steps_and_state, expected)
        assert all(torch.equal(t, before[name]) for name, t in pair.model.state_dict().items())
        pair.same(calls, steps_and_state, expected)

    def test_torch_save_of_the_whole_model(self, calls, configured):
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))
        pair.same(calls, step, expected)
        file = io.BytesIO()
        torch.save(pair.model, file)
        file.seek(0)
        pair.model = torch.load(file, weights_only=False)
        pair.handle = lk.patch(pair.model)
        pair.same(calls, steps_and_state, expected)

    def test_saved_and_loaded(self, calls, configured, tmp_path):
        """The files of a patched model are those of the twin, and train on in an unpatched one."""
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))
        pair.same(calls, step, expected)
        mine, theirs = (get_peft_model_state_dict(m) for m in (pair.model, pair.twin))
        assert list(mine) == list(theirs)
        close(mine, theirs)
        pair.model.save_pretrained(tmp_path)
        base = training().unload()
        loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
        assert type(up_of(loaded)) is PeftLinear
        close(get_peft_model_state_dict(loaded), theirs)
        pair.model, pair.handle = loaded, lk.patch(loaded)
        pair.same(calls, lambda m: [step(m), step(m)], expected)

    def test_optimizer_state_survives_patching_and_unpatching(self, calls, configured):
        """Parameters stay the same objects, so an optimizer made before goes on."""
        kwargs, expected = CONFIGURED[configured]
        model = training(**kwargs)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        x, losses = torch.randn(6, K), []
        handle = lk.patch(model)
        for i in range(6):
            if i == 3:
                handle.unpatch()
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert calls.take() == ((6, 0) if expected == FAST else (0, 6))
        assert losses[5] < losses[3] < losses[0]
        assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())


class TestAdapters:
    def test_late_switched_and_deleted_in_training(self, calls):
        pair = Pair(training(lora_dropout=0.3))
        for change in (
            lambda m: m.add_adapter("late", config(r=2, lora_dropout=0.1)),
            lambda m: m.set_adapter("late"),
            lambda m: m.add_adapter("biased", config(r=3, lora_bias=True)),
            lambda m: m.set_adapter("biased"),
            lambda m: m.delete_adapter("late"),
            lambda m: m.set_adapter("default"),
            lambda m: m.delete_adapter("biased"),
        ):
            pair.do(lambda m, change=change: (change(m), m.train()))
            pair.same(calls, steps_and_state)

    def test_weighted_adapter_of_trained_ones(self, calls):
        pair = Pair(adapters(training()).train())
        for name in ("default", "low"):
            pair.do(lambda m, name=name: m.set_adapter(name))
            pair.same(calls, step)
        pair.do(lambda m: m.add_weighted_adapter(["default", "low"], [0.7, -0.4], "both", combination_type="cat"))
        pair.do(lambda m: (m.set_adapter("both"), m.eval()))
        pair.same(calls, lambda m: m(torch.randn(5, K)).detach())

    def test_modules_to_save(self, calls):
        pair = Pair(training(lora_dropout=0.3, targets=("up",), modules_to_save=["down"]))
        names = pair.same(calls, steps_and_state)[1]
        assert sum("modules_to_save" in name for name in names) == 2
        assert any(p.requires_grad for n, p in pair.model.named_parameters() if "modules_to_save" in n)

    def test_hotswap_between_steps(self, calls, tmp_path):
        torch.manual_seed(9)
        training(lora_dropout=0.3).save_pretrained(tmp_path)
        pair = Pair(training(lora_dropout=0.3))
        pair.same(calls, step)
        pair.do(lambda m: hotswap_adapter(m, str(tmp_path), adapter_name="default"))
        pair.same(calls, steps_and_state)

    def test_hotswap_of_another_rank(self, calls, tmp_path):
        """Padded as PEFT pads for compiled models, with scalings in tensors."""
        torch.manual_seed(9)
        training(r=2, lora_alpha=5).save_pretrained(tmp_path)
        pair = Pair(training(r=4).eval())
        pair.do(lambda m: prepare_model_for_compiled_hotswap(m, target_rank=8))
        x = torch.randn(5, K)
        before = pair.same(calls, lambda m: m(x).detach(), TENSOR_SCALING)
        pair.do(lambda m: hotswap_adapter(m, str(tmp_path), adapter_name="default"))
        assert not torch.allclose(pair.same(calls, lambda m: m(x).detach(), TENSOR_SCALING), before)

    def test_tied_adapters_and_weights(self, calls):
        """A head that shares its weight with the embedding, and one pair of factors in two layers."""
        settings = transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(4)
        base = transformers.LlamaForCausalLM(settings)
        model = get_peft_model(base, config(targets=("lm_head", "q_proj", "v_proj"))).train()
        attention = model.base_model.model.model.layers[0].self_attn
        other = model.base_model.model.lm_head.lora_A
        attention.q_proj.lora_A.default.weight = other.default.weight
        pair = Pair(model)
        head = pair.model.base_model.model.lm_head.base_layer.weight
        assert head is pair.model.get_input_embeddings().weight

        def run(m):
            m.zero_grad()
            loss = m(TOKENS, labels=TOKENS).loss
            loss.backward()
            return loss.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        assert len(pair.same(calls, run)[1]) == 5

    def test_layer_shared_by_two_places(self, calls):
        model = training(lora_dropout=0.3)

        class Twice(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.first = self.second = inner

            def forward(self, x):
                return self.second(self.first(x))

        pair = Pair(Twice(model))
        assert len(pair.handle.report().layers) == 2
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)))


class TestMerged:
    @pytest.mark.parametrize("safe", (False, True))
    @pytest.mark.parametrize("configured", CONFIGURED)
    def test_merged_and_unmerged_between_steps(self, calls, configured, safe):
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))
        x = torch.randn(5, K)
        pair.same(calls, step, expected)
        pair.do(lambda m: (m.eval(), m.merge_adapter(safe_merge=safe)))
        merged = pair.same(calls, lambda m: m(x).detach(), "merged")
        pair.do(lambda m: m.unmerge_adapter())
        close(pair.same(calls, lambda m: m(x).detach(), expected), merged, rtol=1e-4, atol=1e-4)
        pair.do(lambda m: m.train())
        pair.same(calls, steps_and_state, expected)

    @pytest.mark.parametrize("configured", CONFIGURED)
    def test_merge_and_unload(self, calls, configured):
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))
        pair.same(calls, step, expected)
        wanted, found = pair.do(lambda m: m.merge_and_unload(safe_merge=True))
        assert type(found.up) is nn.Linear
        close(state(found), state(wanted))

    def test_merge_of_nan_is_refused_and_nothing_is_changed(self):
        model = training()
        handle = lk.patch(model)
        up_of(model).lora_B.default.weight.data[0, 0] = torch.nan
        before = up_of(model).base_layer.weight.clone()
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(up_of(model).base_layer.weight, before)
        assert handle.report().layers["base_model.model.up"] == FAST

    def test_nan_in_a_factor_comes_out(self, calls):
        pair = Pair(training())
        pair.do(lambda m: up_of(m).lora_A.default.weight.data[0, 0].fill_(torch.nan))
        y = pair.same(calls, lambda m: up_of(m)(torch.randn(5, K)).detach(), equal_nan=True)
        assert y.isnan().all()

    def test_unload(self, calls):
        pair = Pair(training(lora_dropout=0.3))
        pair.same(calls, step)
        wanted, found = pair.do(lambda m: m.unload())
        assert type(found.up) is nn.Linear
        assert all(torch.equal(t, state(wanted)[name]) for name, t in found.state_dict().items())


class Halved(nn.Linear):
    """What a quantised layer is to PEFT: a Linear with a weight of its own making and a forward of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (self.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, (self.packed * self.scale).to(x.dtype), self.bias)


class Wide(nn.Linear):
    """A base that takes an argument of its own."""

    def forward(self, x, factor=1.0):
        return factor * super().forward(x)


class Tuple(nn.Linear):
    """As in Megatron: the output and the bias."""

    def forward(self, x):
        return super().forward(x), self.bias


class TestOtherBases:
    def model(self, cls, **kwargs):
        torch.manual_seed(4)
        base = Net()
        base.up = cls(K, N)
        return get_peft_model(base, config(**kwargs)).train()

    @pytest.mark.parametrize("kwargs", ({}, dict(lora_dropout=0.3), dict(lora_bias=True)))
    @pytest.mark.parametrize("cls", (Halved, Doubling))
    def test_the_bases_own_forward_runs(self, calls, cls, kwargs):
        pair = Pair(self.model(cls, **kwargs))
        x = torch.randn(5, K)
        expected = {"up": OWN_FORWARD, "down": FAST}
        grads = pair.same(calls, lambda m: trained(m, x), expected)[2]
        assert len(grads) == 4 + 2 * bool(kwargs.get("lora_bias"))
        pair.do(lambda m: m.eval())
        with torch.no_grad():
            pair.same(calls, lambda m: m(x), expected)
        plain = nn.functional.linear(x, up_of(pair.twin).base_layer.weight, up_of(pair.twin).base_layer.bias)
        assert not torch.equal(up_of(pair.model).base_layer(x), plain)

    def test_dora_over_it(self, calls):
        """DoRA's norm is of ``weight``; whatever runs, the result is PEFT's."""
        pair = Pair(self.model(Doubling, use_dora=True))
        x = torch.randn(5, K)
        pair.same(calls, lambda m: trained(m, x), {"up": DORA_OVER_OWN_FORWARD, "down": FAST})

    def test_steps(self, calls):
        pair = Pair(self.model(Halved, lora_dropout=0.3))
        expected = {"up": OWN_FORWARD, "down": FAST}
        pair.same(calls, steps_and_state, expected)

    def test_mixed_batch_over_it(self, calls):
        model = self.model(Halved)
        model.add_adapter("low", config(r=1))
        pair = Pair(model.eval())
        x, names = torch.randn(4, 3, K), ["low", "default", "__base__", "low"]
        expected = {"up": OWN_FORWARD, "down": FAST}
        with torch.no_grad():
            pair.same(calls, lambda m: m(x, adapter_names=names), expected)

    def test_base_swapped_under_a_patched_layer(self, calls):
        pair = Pair(training(lora_dropout=0.3))
        pair.same(calls, step)
        pair.do(lambda m: swap_class(up_of(m).base_layer, Doubling))
        expected = {"up": OWN_FORWARD, "down": FAST}
        pair.same(calls, step, expected)
        pair.do(lambda m: swap_class(up_of(m).base_layer, nn.Linear))
        pair.same(calls, step)

    def test_arguments_of_the_base(self, calls):
        """Go with the call, which is PEFT's then."""
        pair = Pair(self.model(Wide))
        x = torch.randn(5, K)
        wanted, found = (up_of(m)(x, factor=0.5) for m in pair)
        close(found, wanted)
        assert not torch.allclose(found, up_of(pair.model)(x))

    def test_base_that_returns_more_than_a_tensor(self, calls):
        """PEFT's error is ours."""
        errors = []
        for m in Pair(self.model(Tuple)):
            with pytest.raises((AttributeError, TypeError)) as error:
                m(torch.randn(5, K))
            errors.append(str(error.value))
        assert errors[0] == errors[1]

    @pytest.mark.parametrize("kind", ("class", "instance", "hook"))
    def test_base_that_returns_what_others_hold(self, calls, kind):
        """LoRA must not be added in place to what the base did not make for it."""
        held = torch.zeros(5, N)

        class Constant(nn.Linear):
            def forward(self, x):
                return held

        pair = Pair(self.model(Constant if kind == "class" else nn.Linear))
        if kind == "instance":
            pair.do(lambda m: setattr(up_of(m).base_layer, "forward", lambda x: held))
        if kind == "hook":
            pair.do(lambda m: up_of(m).base_layer.register_forward_hook(lambda m, args, y: held))
        x = torch.randn(5, K)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                pair.same(calls, lambda m: up_of(m)(x).detach(), {"up": OWN_FORWARD})
            assert not held.any()

    def test_the_bases_forward_runs_once(self, calls):
        """Whatever it does besides: here it draws random numbers."""

        class Noisy(nn.Linear):
            def forward(self, x):
                return super().forward(x) + torch.randn(())

        pair = Pair(self.model(Noisy, lora_dropout=0.3))
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), {"up": OWN_FORWARD, "down": FAST})

    @pytest.mark.parametrize("above", (False, True))
    def test_nested_tuners(self, calls, above):
        """LoRA over IA3, and IA3 over LoRA: the base layer of one is a layer of the other."""
        torch.manual_seed(4)
        first = config(targets=("up", "down"), lora_dropout=0.3)
        second = IA3Config(target_modules=["up", "down"], feedforward_modules=[], init_ia3_weights=False)
        if above:
            first, second = second, first
        pair = Pair(get_peft_model(get_peft_model(Net(), first).base_model.model, second).train())
        own = OVER_ANOTHER_TUNER if above else FAST
        ends = ("up", "base_layer") if above else ("base_layer", "up")
        x = torch.randn(5, K)
        grads = pair.same(calls, lambda m: trained(m, x), dict(zip(ends, (own, "not patched: ia3"), strict=True)))[2]
        assert any("lora_A" in name for name in grads) or not above


class TestHooks:
    """accelerate's, which move weights in for the time of a call."""

    @pytest.mark.parametrize("when", ("before", "after"))
    def test_align_devices_of_the_base(self, calls, when):
        model = training(lora_dropout=0.3)
        twin = copy.deepcopy(model)
        if when == "after":
            lk.patch(model)
        for m in (twin, model):
            hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True)
            hooks.add_hook_to_module(up_of(m).base_layer, hook)
            assert up_of(m).base_layer.weight.is_meta
        pair = Pair.__new__(Pair)
        pair.twin, pair.model, pair.handle = twin, model, lk.patch(model)
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), {"up": HOOKED_BASE, "down": FAST})
        assert up_of(model).base_layer.weight.is_meta

    @pytest.mark.parametrize("when", ("before", "after"))
    def test_cpu_offload(self, calls, when):
        model = training().eval()
        twin = copy.deepcopy(model)
        if when == "after":
            lk.patch(model)
        for m in (twin, model):
            cpu_offload(m, execution_device="cpu")
            assert up_of(m).lora_A.default.weight.is_meta
        pair = Pair.__new__(Pair)
        pair.twin, pair.model, pair.handle = twin, model, lk.patch(model)
        with torch.no_grad():
            pair.same(calls, lambda m: m(torch.randn(5, K)), OFFLOADED)

    def test_dispatched_to_one_device(self, calls):
        pair = Pair(training(lora_dropout=0.3))
        pair.do(lambda m: dispatch_model(m, {"": "cpu"}, force_hooks=True))
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), DISPATCHED)

    def test_layer_hook_removed(self, calls):
        pair = Pair(training(lora_dropout=0.3))
        pair.do(lambda m: hooks.add_hook_to_module(up_of(m), hooks.AlignDevicesHook(execution_device="cpu")))
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)))
        pair.do(lambda m: hooks.remove_hook_from_module(up_of(m)))
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)))

    def test_a_hook_on_the_base_sees_its_output(self, calls):
        """A base with a hook gives what the hook makes of it."""
        pair = Pair(training(lora_dropout=0.3))
        seen = []
        pair.do(lambda m: up_of(m).base_layer.register_forward_hook(lambda m, args, y: seen.append(1) or 2 * y))
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), {"up": HOOKED_BASE, "down": FAST})
        assert len(seen) == 2

    def test_parametrized_base(self, calls):
        pair = Pair(training(lora_dropout=0.3))
        pair.do(lambda m: nn.utils.parametrizations.weight_norm(up_of(m).base_layer).requires_grad_(False))
        expected = {"up": OWN_FORWARD, "down": FAST}
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), expected)


def test_nothing_is_registered(calls):
    """No parameter, buffer or module, whatever is trained."""
    for kwargs, _ in CONFIGURED.values():
        twin, model, _ = both(training(**kwargs))
        step(model)
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in twin.named_parameters()]
        assert [n for n, _ in model.named_buffers()] == [n for n, _ in twin.named_buffers()]
        assert [n for n, _ in model.named_modules()] == [n for n, _ in twin.named_modules()]
