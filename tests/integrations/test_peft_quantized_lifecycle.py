"""What is done to a patched model over bitsandbytes' layers: switches, merges, copies, checkpointing, compiling."""

import copy
import pickle

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

from nets import TOKENS, close, config, up_of  # noqa: E402
from packed_bases import BASES, K, N, Net, PackedPair, dequantised, kernels, linear, net  # noqa: E402
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from seeded import BESIDE  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations import _peft_packed  # noqa: E402
from lora_kernels.integrations.peft import FAST  # noqa: E402
from lora_kernels.testing.numerics import bitwise_equal  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def a_kernel():
    with kernels():
        yield


@pytest.fixture
def repacks():
    """bitsandbytes repacks weights for this machine's CPU in eval mode."""
    if not bnb.functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")


def output(x):
    return lambda m: m(x).detach()


def step(model):
    """One step of SGD; the loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(6, K)
    loss = (model(x) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same_state(a, b):
    """The same names in the same order, and of the base the same bits."""
    assert list(a) == list(b)
    assert all(bitwise_equal(a[name], b[name]) for name in a if "lora_" not in name)
    close({name: t for name, t in a.items() if "lora_" in name}, {name: t for name, t in b.items() if "lora_" in name})


class TestSwitches:
    @pytest.mark.parametrize("base", BASES[:3])
    def test_modes_and_adapters(self, calls, base):
        model = net(base, lora_dropout=0.2)
        model.add_adapter("low", config(r=2, lora_alpha=5))
        pair = PackedPair(model)
        x = torch.randn(5, K)
        disabled = "base layer only: adapters disabled"
        pair.same(calls, step)
        pair.do(lambda m: m.eval())
        first = pair.same(calls, output(x))
        with pair.twin.disable_adapter(), pair.model.disable_adapter():
            assert set(pair.handle.report().layers.values()) == {disabled}
            close(pair.model(x), pair.twin(x))
            assert calls.take() == (2, 0)
        pair.do(lambda m: m.set_adapter("low"))
        assert not torch.equal(pair.same(calls, output(x)), first)
        pair.do(lambda m: m.delete_adapter("low"))
        pair.do(lambda m: m.set_adapter("default"))
        assert torch.equal(pair.same(calls, output(x)), first)
        pair.do(lambda m: (m.add_adapter("late", config(r=3)), m.set_adapter("late"), m.train()))
        pair.same(calls, step)
        same_state(*map(state, pair))

    @pytest.mark.parametrize("safe", (False, True))
    @pytest.mark.parametrize("base", BASES)
    def test_merged_and_unmerged(self, calls, base, safe):
        """The bytes PEFT makes, and they are seen."""
        pair = PackedPair(net(base))
        x = torch.randn(5, K)
        pair.same(calls, output(x))
        pair.do(lambda m: m.merge_adapter(safe_merge=safe))
        assert set(pair.handle.report().layers.values()) == {"base layer only: adapters merged"}
        same_state(*map(state, pair))
        close(*(output(x)(m) for m in pair))
        pair.do(lambda m: m.unmerge_adapter())
        pair.same(calls, output(x))
        same_state(*map(state, pair))
        wanted, found = pair.do(lambda m: m.merge_and_unload())
        assert type(found.up) is type(up_of(net(base)).base_layer)
        same_state(state(wanted), state(found))

    def test_dora_and_variants_stay_pefts(self, calls):
        pair = PackedPair(net("nf4", use_dora=True))
        reason = "DoRA needs a plain base: base layer is Linear4bit, not torch.nn.Linear"
        pair.same(calls, output(torch.randn(5, K)), reason)
        with pytest.raises(ValueError, match=reason):
            lk.patch(net("nf4", use_dora=True), strict=True)

    def test_hooks_on_the_base_layer_run(self, calls):
        pair = PackedPair(net("nf4"))
        x = torch.randn(5, K)
        pair.same(calls, output(x))
        handles = pair.do(lambda m: up_of(m).base_layer.register_forward_hook(lambda module, args, y: y * 2))
        changed = pair.same(calls, output(x), {"up": BESIDE, "down": FAST})
        for handle in handles:
            handle.remove()
        assert not torch.equal(pair.same(calls, output(x)), changed)

    def test_not_quantised_yet(self):
        layer = bnb.nn.Linear8bitLt(K, N)  # 16 bits that are quantised at each call
        base = nn.Module()
        base.up, base.is_loaded_in_8bit = layer, True
        handle = lk.patch(get_peft_model(base, config(targets=("up",))))
        assert handle.report().layers == {"base_model.model.up": f"{BESIDE}: base layer is not quantised yet"}

    def test_without_a_kernel_the_base_runs_by_itself(self, monkeypatch):
        pair = PackedPair(net("nf4"))
        monkeypatch.setattr(_peft_packed, "missing_kernel", lambda device: "none here")
        assert pair.handle.report().layers["base_model.model.up"] == f"{BESIDE}: none here"
        x = torch.randn(5, K)
        assert torch.equal(up_of(pair.model).base_layer(x), up_of(pair.twin).base_layer(x))
        close(pair.model(x), pair.twin(x))
        assert up_of(pair.model) not in _peft_packed._packed or not _peft_packed._packed[up_of(pair.model)]._weight


class TestBytes:
    @pytest.mark.parametrize("base", BASES)
    def test_unpatched_bit_for_bit(self, base):
        model = net(base)
        before = state(model)
        layer, x = up_of(model), torch.randn(5, K)
        pointer = layer.base_layer.weight.data_ptr()
        handle = lk.patch(model, strict=True)
        for training in (True, False):
            model.train(training)(x)
        with model.disable_adapter():
            model(x)
        assert layer.base_layer.weight.data_ptr() == pointer
        assert _peft_packed._packed[layer].weight().codes.data_ptr() == pointer
        handle.unpatch()
        assert layer not in _peft_packed._packed
        same_state(before, state(model))
        assert set(vars(layer)) == set(vars(up_of(net(base))))

    @pytest.mark.parametrize("base", ("nf4", "nf4 nested"))
    @pytest.mark.parametrize("saved", (False, True))
    def test_repacked_before(self, repacks, base, saved):
        """By eval mode before the model was patched, and put back in part where a state dict was asked for."""
        model = net(base)
        weights = [dequantised(layer.base_layer) for layer in (up_of(model), model.base_model.model.down)]
        codes = up_of(model).base_layer.weight.data.clone()
        with torch.no_grad():
            model.eval()(torch.randn(2, K))
        if saved:
            model.state_dict()
        else:
            assert up_of(model).base_layer.weight.shape == (N, K // 2)
        lk.patch(model)
        for layer, weight in zip((up_of(model), model.base_model.model.down), weights, strict=True):
            now = dequantised(layer.base_layer)
            assert (now - weight).norm() < 0.005 * weight.norm()  # the statistics were rounded to bf16
        assert torch.equal(up_of(model).base_layer.weight.data, codes)
        x = torch.randn(5, K)
        exact = x.double() @ weights[0].T + up_of(model).base_layer.bias.double()
        with model.disable_adapter(), torch.no_grad():
            assert (up_of(model)(x) - exact).norm() < 0.005 * exact.norm()

    def test_repacked_between(self, repacks, calls):
        """A base layer that is called by itself in eval mode; merging then is PEFT's of what it was."""
        pair = PackedPair(net("nf4").eval())
        x = torch.randn(5, K)
        before = pair.same(calls, output(x))
        layer = up_of(pair.model)
        with torch.no_grad():
            layer.base_layer(x)
        assert layer.base_layer.weight.quant_state.packing_format_for_cpu
        assert (output(x)(pair.model) - before).norm() < 0.005 * before.norm()
        assert calls.take() == (2, 0)
        with torch.no_grad():
            layer.base_layer(x)
        pair.do(lambda m: m.merge_adapter())
        merged = [dequantised(up_of(m).base_layer) for m in pair]
        assert (merged[1] - merged[0]).norm() < 0.05 * merged[0].norm()  # some codes are another, none read askew

    @pytest.mark.parametrize("base", ("nf4 nested", "int8"))
    @pytest.mark.parametrize("clone", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
    def test_copies_stand_alone(self, calls, base, clone):
        pair = PackedPair(net(base))
        x = torch.randn(5, K)
        before = pair.same(calls, output(x))
        other = clone(pair.model)
        assert type(up_of(other)) is type(up_of(pair.model))
        calls.take()
        close(other(x), before)
        assert calls.take() == (2, 0)
        assert set(lk.patch(other).report().layers.values()) == {FAST}
        weight = up_of(other).base_layer.weight
        (weight.CB if base == "int8" else weight.data).zero_()
        assert not torch.allclose(other(x), before)
        assert torch.equal(pair.model(x), before)

    @pytest.mark.parametrize("base", BASES)
    def test_saved_and_loaded(self, calls, base, tmp_path):
        pair = PackedPair(net(base))
        pair.same(calls, step)
        pair.model.save_pretrained(tmp_path)
        torch.manual_seed(4)
        loaded = PeftModel.from_pretrained(Net(base), tmp_path, is_trainable=True)
        same_state(state(pair.twin), state(loaded))
        pair.model, pair.handle = loaded, lk.patch(loaded)
        pair.same(calls, step)

    def test_moved(self, calls):
        pair = PackedPair(net("nf4 nested"))
        pair.same(calls, step)
        pair.do(lambda m: m.to("cpu"))
        pair.same(calls, step)
        pair.do(lambda m: m.bfloat16())
        pair.same(calls, lambda m: m(torch.randn(5, K).bfloat16()).detach(), rtol=0.02, atol=0.02)


class TestTraining:
    @pytest.mark.parametrize("reentrant", (True, False))
    @pytest.mark.parametrize("base", ("nf4 nested", "int8"))
    def test_prepared_for_kbit_training(self, calls, base, reentrant):
        """A language model as users train it: checkpointed, inputs that require gradients, norms in fp32, dropout."""
        torch.manual_seed(4)
        settings = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(settings).bfloat16()
        for block in model.model.layers:
            for part in (block.self_attn, block.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, nn.Linear):
                        new = linear(base, child.in_features, child.out_features, False, torch.float32)
                        setattr(part, name, new)
        setattr(model, "is_loaded_in_8bit" if base == "int8" else "is_loaded_in_4bit", True)
        model = prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": reentrant, "preserve_rng_state": True}
        )
        targets = ("q_proj", "v_proj", "o_proj", "up_proj")
        pair = PackedPair(get_peft_model(model, config(targets=targets, lora_dropout=0.2)).train())
        assert pair.handle.report().fast == 8

        def run(m):
            m.zero_grad()
            loss = m(TOKENS, labels=TOKENS).loss
            loss.backward()
            return loss.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        grads = pair.same(calls, run)[1]
        assert len(grads) == 16

    @pytest.mark.parametrize("training", (True, False))
    def test_compiled(self, unforced, training):
        """Compiled, the base layer runs by its own forward, as without the package."""
        pair = PackedPair(net("nf4").train(training))
        up_of(pair.model).base_layer.support_avx512bf16_for_cpu = False
        x = torch.randn(5, K)
        with torch.set_grad_enabled(training):
            wanted = up_of(pair.twin)(x)
            close(torch.compile(up_of(pair.model), backend="eager")(x), wanted)
            with kernels():
                close(up_of(pair.model)(x), wanted)
