"""``lora_kernels.patch`` with PEFT itself as the oracle: every result is compared with that of an unpatched model."""

import contextlib
import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from peft.utils.hotswap import hotswap_adapter  # noqa: E402
from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations import _peft_batch, _peft_layer  # noqa: E402
from lora_kernels.integrations.peft import FAST, FusedLinear, FusedMixin  # noqa: E402
from lora_kernels.ops import _dispatch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def unforced(monkeypatch):
    """As users call it, with or without the extension: a graph only names its ops."""
    monkeypatch.setattr(_peft_layer, "_compiled", True)
    token = _dispatch._forced.set(None)
    yield
    _dispatch._forced.reset(token)


K, N = 24, 40


@pytest.fixture(autouse=True)
def a_backend():
    """The compiled kernels, or the reference by force: unforced it would leave every layer to PEFT."""
    if _dispatch.extension_error is None:
        yield
    else:
        with lk.backend("reference"):
            yield


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.up = nn.Linear(K, N, bias=bias)
        self.down = nn.Linear(N, K, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def config(r=4, targets=("up", "down"), **kwargs):
    kwargs = {"lora_alpha": 6, "init_lora_weights": False, **kwargs}
    return LoraConfig(r=r, target_modules=list(targets), **kwargs)


def net(dtype=torch.float32, bias=True, masters=True, **kwargs):
    """A small PEFT model in eval mode; its adapter 'default' is anything but zero."""
    return get_peft_model(Net(bias).to(dtype), config(**kwargs), autocast_adapter_dtype=masters).eval()


def adapters(model=None):
    """A model with adapters that differ in rank, scaling and the layers they are in."""
    model = net() if model is None else model
    model.add_adapter("low", config(r=1, lora_alpha=3))
    model.add_adapter("up_only", config(r=7, targets=("up",), use_rslora=True))
    model.add_adapter("pattern", config(r=3, rank_pattern={"up": 5}, alpha_pattern={"down": 11}))
    return model.eval()


@functools.cache
def _llama(bias):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, attention_bias=bias, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )
    )  # fmt: skip


def llama(dtype=torch.float32, bias=False):
    """Two layers of seven LoRA linears, three adapters."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = get_peft_model(copy.deepcopy(_llama(bias)).to(dtype), config(targets=targets, lora_alpha=16))
    model.add_adapter("one", config(r=2, targets=targets, lora_alpha=9))
    model.add_adapter("two", config(r=8, targets=("q_proj", "down_proj"), lora_alpha=40))
    return model.eval()


LLAMA_LAYERS = 14
TOKENS = torch.arange(1, 25).reshape(4, 6)


def both(model):
    """(an unpatched copy, the model patched, its handle)."""
    oracle = copy.deepcopy(model)
    return oracle, model, lk.patch(model)


def close(actual, expected, **kwargs):
    torch.testing.assert_close(actual, expected, **{"rtol": 2e-5, "atol": 2e-5, **kwargs})


def trained(model, x, **kwargs):
    """(output, dx, gradient of every parameter that has one)."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **kwargs)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


class TestOneAdapter:
    @pytest.mark.parametrize("bias", (True, False))
    def test_outputs_and_gradients(self, calls, bias):
        oracle, model, _ = both(net(bias=bias))
        x = torch.randn(3, 5, K)
        with torch.no_grad():
            close(model(x), oracle(x))
        expected, actual = trained(oracle, x), trained(model, x)
        close(actual, expected)
        assert len(actual[2]) == 4
        assert calls.take() == (4, 0)

    @pytest.mark.parametrize("masters", (True, False))
    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    def test_half_precision_is_no_less_exact_than_peft(self, calls, dtype, masters):
        oracle, model, _ = both(net(dtype, masters=masters))
        assert model.base_model.model.up.lora_A.default.weight.dtype == (torch.float32 if masters else dtype)
        exact = copy.deepcopy(oracle).double()
        layer = "base_model.model.up"
        x = torch.randn(512, K).to(dtype)
        truth = trained(exact.get_submodule(layer), x.double())
        expected, actual = trained(oracle.get_submodule(layer), x), trained(model.get_submodule(layer), x)
        for t, e, a in zip((*truth[:2], *truth[2].values()), (*expected[:2], *expected[2].values()),
                           (*actual[:2], *actual[2].values()), strict=True):  # fmt: skip
            assert a.dtype == e.dtype
            assert (a - t).norm() <= 1.05 * (e - t).norm() + 1e-6 * t.norm()
        with torch.no_grad():
            assert torch.equal(model.get_submodule(layer)(x), actual[0])
        assert calls.take() == (2, 0)

    @pytest.mark.parametrize("shape", ((K,), (7, K), (2, 3, K), (2, 3, 2, K), (0, K), (2, 0, K)))
    def test_every_shape(self, calls, shape):
        oracle, model, _ = both(net())
        x = torch.randn(shape)
        kept = x.clone()
        with torch.no_grad():
            close(model(x), oracle(x))
        if x.numel():
            close(trained(model, x), trained(oracle, x))
        assert torch.equal(x, kept)
        assert calls.slow == 0
        assert calls.fast >= 2

    @pytest.mark.parametrize(
        "x",
        (
            lambda: torch.randn(K, 6).T,
            lambda: torch.randn(5, 4, K).transpose(0, 1),
            lambda: torch.randn(1, K).expand(6, K),
            lambda: torch.randn(6, 2 * K)[:, ::2],
        ),
    )
    def test_strided_inputs(self, calls, x):
        oracle, model, _ = both(net())
        x = x()
        with torch.no_grad():
            close(model(x), oracle(x))
        assert calls.take() == (2, 0)

    def test_frozen_factors_get_no_gradient(self, calls):
        model = net()
        up = model.base_model.model.up
        up.lora_A.default.weight.requires_grad_(False)
        model.base_model.model.down.lora_B.default.weight.requires_grad_(False)
        oracle, model, _ = both(model)
        expected, actual = trained(oracle, torch.randn(4, K)), None
        actual = trained(model, torch.randn(4, K))
        assert actual[2].keys() == expected[2].keys()
        assert len(actual[2]) == 2
        assert calls.take() == (2, 0)

    def test_trainable_base_bias(self, calls):
        oracle, model, _ = both(net(bias=True))
        for m in (oracle, model):
            m.base_model.model.up.base_layer.bias.requires_grad_()
        x = torch.randn(4, K)
        close(trained(model, x), trained(oracle, x))
        assert calls.take() == (2, 0)

    def test_backward_twice(self):
        model = net()
        lk.patch(model)
        loss = model(torch.randn(4, K)).square().sum()
        grads = []
        for retain in (True, False):
            model.zero_grad()
            loss.backward(retain_graph=retain)
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        assert len(grads[0]) == 4

    def test_keyword_input_and_inference_mode(self, calls):
        oracle, model, _ = both(net())
        x = torch.randn(4, K)
        with torch.inference_mode():
            close(model.base_model.model.up(x=x), oracle.base_model.model.up(x=x))
        assert calls.take() == (1, 0)

    def test_training_step_is_seen(self, calls):
        oracle, model, _ = both(net())
        x = torch.randn(4, K)
        for m in (oracle, model):
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
            for _ in range(3):
                m.zero_grad()
                m(x).square().mean().backward()
                optimizer.step()
        close(model(x), oracle(x))
        assert calls.slow == 0

    def test_compiles_without_a_graph_break(self, unforced):
        oracle, model, _ = both(net())
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model.base_model.model, backend=backend, fullgraph=True)
        x = torch.randn(4, K)
        with torch.no_grad():
            close(compiled(x), oracle(x))
        assert "lora_add_" in graphs[0].code


class TestSeveralActive:
    @pytest.mark.parametrize("active", (["default", "low"], ["default", "pattern", "up_only"], ["up_only", "absent"]))
    def test_sum_of_adapters(self, calls, active):
        oracle, model, handle = both(adapters())
        for m in (oracle, model):
            for layer in (m.base_model.model.up, m.base_model.model.down):
                layer.set_adapter(active)
        x = torch.randn(4, 3, K)
        close(trained(model, x), trained(oracle, x))
        with torch.no_grad():
            close(model(x), oracle(x))
        only_up = active == ["up_only", "absent"]
        assert calls.take() == ((2, 2) if only_up else (4, 0))
        assert handle.report().layers["base_model.model.down"] == (_peft_layer.INACTIVE if only_up else FAST)

    @pytest.mark.parametrize("alpha", (6, 9))
    @pytest.mark.parametrize("masters", (True, False))
    def test_bf16(self, calls, alpha, masters):
        model = net(torch.bfloat16, masters=masters)
        model.add_adapter("other", config(lora_alpha=alpha), autocast_adapter_dtype=masters)
        layer = model.base_model.model.up
        layer.set_adapter(["default", "other"])
        x = torch.randn(256, K).bfloat16()
        truth, expected = trained(copy.deepcopy(layer).double(), x.double()), trained(copy.deepcopy(layer), x)
        lk.patch(model)
        actual = trained(layer, x)
        for t, e, a in zip((*truth[:2], *truth[2].values()), (*expected[:2], *expected[2].values()),
                           (*actual[:2], *actual[2].values()), strict=True):  # fmt: skip
            assert a.dtype == e.dtype
            assert (a - t).norm() <= 1.05 * (e - t).norm() + 1e-6 * t.norm()
        assert calls.take() == (1, 0)


BATCHES = (
    ["default", "low", "__base__", "pattern"],
    ["up_only", "low", "up_only", "default"],
    ["up_only", "up_only", "__base__", "__base__"],
    ["low", "low", "low", "low"],
    ("default", "__base__", "default", "low"),
)


class TestMixedBatch:
    @pytest.mark.parametrize("names", BATCHES)
    @pytest.mark.parametrize("shape", ((4, K), (4, 5, K), (4, 2, 3, K)))
    def test_outputs(self, calls, names, shape):
        oracle, model, _ = both(adapters())
        x = torch.randn(shape)
        with torch.no_grad():
            close(model(x, adapter_names=names), oracle(x, adapter_names=names))
        down_has_none = not {"default", "low", "pattern"} & set(names)
        assert calls.take() == ((1, 1) if down_has_none else (2, 0))

    def test_no_adapter_at_all(self, calls):
        oracle, model, _ = both(adapters())
        x = torch.randn(4, K)
        with torch.no_grad():
            assert torch.equal(model(x, adapter_names=["__base__"] * 4), oracle(x, adapter_names=["__base__"] * 4))
        assert calls.take() == (0, 2)

    @pytest.mark.parametrize("names", BATCHES)
    def test_gradients(self, calls, names):
        oracle, model, _ = both(adapters())
        for m in (oracle, model):
            for name, p in m.named_parameters():
                p.requires_grad_("lora_" in name)
        x = torch.randn(4, 2, K)
        expected, actual = trained(oracle, x, adapter_names=names), trained(model, x, adapter_names=names)
        for name, grad in actual[2].items():  # adapters without a row: zeros where PEFT has none
            close(grad, expected[2].get(name, torch.zeros_like(grad)))
        assert expected[2].keys() <= actual[2].keys()
        close(actual[:2], expected[:2])
        assert calls.fast >= 1

    def test_bf16_base_with_masters(self, calls):
        oracle, model, _ = both(adapters(net(torch.bfloat16)))
        names = BATCHES[0] * 64
        layer, x = "base_model.model.up", torch.randn(256, K).bfloat16()
        with torch.no_grad():
            truth = copy.deepcopy(oracle).double().get_submodule(layer)(x.double(), adapter_names=names)
            expected = oracle.get_submodule(layer)(x, adapter_names=names)
            actual = model.get_submodule(layer)(x, adapter_names=names)
        assert actual.dtype == expected.dtype
        assert (actual - truth).norm() <= 1.05 * (expected - truth).norm()
        assert calls.take() == (1, 0)

    def test_row_does_not_depend_on_its_batch(self):
        model = adapters()
        lk.patch(model)
        x = torch.randn(4, K)
        layer = model.base_model.model.up
        with torch.no_grad():
            delta = [layer(x, adapter_names=n)[0] for n in (["low"] * 4, ["low", "default", "pattern", "__base__"])]
        assert torch.equal(*delta)

    def test_scaling_may_change_between_calls(self, calls):
        oracle, model, _ = both(adapters())
        x = torch.randn(4, K)
        for scale in (0.25, 3.0, 3):
            for m in (oracle, model):
                m.base_model.model.up.scaling["low"] = scale
            with torch.no_grad():
                close(model(x, adapter_names=BATCHES[0]), oracle(x, adapter_names=BATCHES[0]))
        assert calls.take() == (6, 0)

    def test_caller_may_change_its_list_of_names(self):
        oracle, model, _ = both(adapters())
        x, names = torch.randn(4, K), list(BATCHES[0])
        with torch.no_grad():
            for _ in range(2):
                close(model(x, adapter_names=names), oracle(x, adapter_names=names))
                names.reverse()

    def test_plan_is_built_once_for_all_layers_and_steps(self, monkeypatch, calls):
        oracle, model, _ = both(llama())
        plans = []
        from lora_kernels import plan

        inner = plan.lora_plan_
        monkeypatch.setattr(plan, "lora_plan_", lambda *args: (plans.append(args), inner(*args))[1])
        _peft_batch._routing.cache_clear()
        names = ["default", "one", "__base__", "default"]
        with torch.no_grad():
            for _ in range(3):
                close(model(TOKENS, adapter_names=names).logits, oracle(TOKENS, adapter_names=names).logits)
        assert len(plans) == 1
        assert calls.take() == (3 * LLAMA_LAYERS, 0)

    @pytest.mark.parametrize("beams", (1, 2))
    def test_generates_the_same_tokens(self, calls, beams):
        oracle, model, _ = both(llama(bias=True))
        names = ["default", "two", "__base__", "one"]
        options = dict(max_new_tokens=8, do_sample=False, num_beams=beams, attention_mask=torch.ones_like(TOKENS))
        expected = oracle.generate(TOKENS, adapter_names=names, **options)
        assert torch.equal(model.generate(TOKENS, adapter_names=names, **options), expected)
        assert calls.slow == 0
        assert calls.fast == 8 * LLAMA_LAYERS
        plain = oracle.generate(TOKENS, adapter_names=["__base__"] * 4, **options)
        assert not torch.equal(plain[[0, 1, 3]], expected[[0, 1, 3]])

    def test_plan_made_under_inference_mode_serves_autograd(self):
        oracle, model, _ = both(adapters())
        _peft_batch._routing.cache_clear()
        _peft_batch.scaling_tensor.cache_clear()
        x, names = torch.randn(4, K), BATCHES[0]
        with torch.inference_mode():
            model(x, adapter_names=names)
        close(trained(model, x, adapter_names=names)[1], trained(oracle, x, adapter_names=names)[1])

    def test_compiled_goes_to_peft(self, unforced):
        oracle, model, _ = both(adapters())
        compiled = torch.compile(_up(model), backend="eager", fullgraph=True)
        x = torch.randn(4, K)
        with torch.no_grad():
            for names in (BATCHES[0], BATCHES[1]):
                close(compiled(x, adapter_names=names), _up(oracle)(x, adapter_names=names))

    def test_layers_get_the_names_without_hooks(self, calls):
        model = adapters()
        lk.patch(model)
        up = _up(model)
        before = dict(up.__dict__)
        with torch.no_grad(), model._enable_peft_forward_hooks(adapter_names=["low"] * 4):
            assert not up._forward_pre_hooks
            low = up(torch.ones(4, K))
            with model._enable_peft_forward_hooks(adapter_names=["pattern"] * 4):
                pattern = up(torch.ones(4, K))
            assert torch.equal(up(torch.ones(4, K)), low)
            assert not torch.equal(pattern, low)
        assert calls.take() == (3, 0)
        with pytest.raises(ZeroDivisionError), model._enable_peft_forward_hooks(adapter_names=["low"] * 4):
            raise ZeroDivisionError
        assert up.__dict__ == before

    def test_modules_that_are_not_fast_get_them_as_hooks(self, calls):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.up, self.down, self.head = nn.Embedding(9, K), *(nn.Linear(K, K) for _ in range(3))

            def forward(self, ids):
                return self.head(self.down(self.up(self.embed(ids))))

        targets = ("embed", "up", "down")
        model = get_peft_model(Mixed(), config(targets=targets, modules_to_save=["head"]))
        model.add_adapter("other", config(r=2, targets=targets, modules_to_save=["head"]))
        nn.init.normal_(model.base_model.model.head.modules_to_save["other"].weight)
        oracle, model, _ = both(model.eval())
        for m in (oracle, model):
            _instance_forward(m.base_model.model.down)
        ids, names = torch.arange(8).view(4, 2), ["default", "other", "__base__", "other"]
        with torch.no_grad():
            expected = oracle(ids, adapter_names=names)
            close(model(ids, adapter_names=names), expected)
            assert not torch.allclose(expected, oracle(ids, adapter_names=names[::-1]))
        assert calls.take() == (2, 0)
        assert not any(m._forward_pre_hooks for m in model.modules())

    def test_peft_errors(self):
        oracle, model, _ = both(adapters())
        x = torch.randn(4, K)

        def message(m, names):
            with pytest.raises(ValueError) as error:
                m(x, adapter_names=names)
            return str(error.value)

        for names in (["low"] * 3, ["nobody"] * 4):
            assert message(model, names) == message(oracle, names)
        for m in (oracle, model):
            m.train()
        assert message(model, ["low"] * 4) == message(oracle, ["low"] * 4)
        for m in (oracle, model):
            m.eval()
            m.merge_adapter()
        assert message(model, ["low"] * 4) == message(oracle, ["low"] * 4)


class TestState:
    """What users do to a PEFT model after patching it."""

    @pytest.fixture
    def pair(self):
        return both(adapters())

    def check(self, pair, calls, fast=2, **kwargs):
        oracle, model, _ = pair
        x = torch.randn(4, K)
        calls.take()
        with torch.no_grad():
            close(model(x, **kwargs), oracle(x, **kwargs))
        assert calls.take() == (fast, 2 - fast)

    def test_scaling(self, pair, calls):
        for change in (
            lambda up: up.set_scale("default", 3.0),
            lambda up: up.scale_layer(0.5),
            lambda up: up.unscale_layer(),
            lambda up: up.scaling.update(default=0),
        ):
            for m in pair[:2]:
                change(m.base_model.model.up)
            self.check(pair, calls)
        with rescale_adapter_scale(pair[0], 0.3), rescale_adapter_scale(pair[1], 0.3):
            self.check(pair, calls)

    def test_switching_adding_and_deleting(self, pair, calls):
        for change in (
            lambda m: m.set_adapter("low"),
            lambda m: m.add_adapter("late", config(r=2)),
            lambda m: m.set_adapter("late"),
            lambda m: m.delete_adapter("low"),
            lambda m: (
                m.base_model.rename_adapter("late", "renamed") if hasattr(m.base_model, "rename_adapter") else None
            ),
        ):
            for m in pair[:2]:
                torch.manual_seed(1)
                change(m)
            self.check(pair, calls)
        self.check(pair, calls, adapter_names=["pattern", "default", "up_only", "__base__"])
        for m in pair[:2]:
            m.delete_adapter("late")  # the active one: PEFT picks another
        self.check(pair, calls)

    def test_disabled(self, pair, calls):
        oracle, model, handle = pair
        with oracle.disable_adapter(), model.disable_adapter():
            self.check(pair, calls, fast=0)
            assert set(handle.report().layers.values()) == {_peft_layer.DISABLED}
            lk.patch(model, strict=True)
        self.check(pair, calls)

    def test_merged_and_unmerged(self, pair, calls):
        for m in pair[:2]:
            m.merge_adapter()
        self.check(pair, calls, fast=0)
        assert set(pair[2].report().layers.values()) == {_peft_layer.MERGED}
        for m in pair[:2]:
            m.unmerge_adapter()
        self.check(pair, calls)

    def test_merge_and_unload(self, pair):
        x = torch.randn(4, K)
        expected = pair[0](x)
        merged = pair[1].merge_and_unload()
        assert type(merged.up) is nn.Linear
        close(merged(x), expected)

    def test_parameters_replaced(self, pair, calls):
        new = nn.Parameter(torch.randn(4, K))
        for m in pair[:2]:
            m.base_model.model.up.lora_A.default.weight = new
        self.check(pair, calls)
        for m in pair[:2]:
            m.base_model.model.up.lora_B["default"] = copy.deepcopy(m.base_model.model.up.lora_B["default"])
            m.base_model.model.up.lora_B.default.weight.data.mul_(2)
        self.check(pair, calls)

    def test_hotswap(self, pair, calls, tmp_path):
        other = net()
        other.save_pretrained(tmp_path)
        for m in pair[:2]:
            hotswap_adapter(m, str(tmp_path), adapter_name="default")
        self.check(pair, calls)
        assert torch.equal(_up(pair[1]).lora_A.default.weight, _up(other).lora_A.default.weight)

    def test_cast_of_the_whole_model(self, pair, calls):
        for m in pair[:2]:
            m.to(torch.bfloat16)
        x = torch.randn(4, K).bfloat16()
        close(pair[1](x), pair[0](x), rtol=0.05, atol=0.05)
        assert calls.take() == (2, 0)

    def test_late_targets_need_another_patch(self, calls):
        model = net(targets=("up",))
        first = lk.patch(model)
        model.add_adapter("more", config(targets=("up", "down")))
        model.set_adapter("more")
        assert first.report().layers["base_model.model.down"].startswith("not patched")
        model(torch.randn(4, K))
        assert calls.take() == (1, 0)
        second = lk.patch(model)
        assert first.report() == second.report()
        assert second.report().fast == 2
        model(torch.randn(4, K))
        assert calls.take() == (2, 0)
        second.unpatch()
        assert {type(m) for m in model.modules() if isinstance(m, PeftLinear)} == {PeftLinear}
        assert type(model.base_model) is peft.LoraModel

    def test_deepcopy_and_pickle(self, pair, calls):
        x = torch.randn(4, K)
        for clone in (copy.deepcopy(pair[1]), pickle.loads(pickle.dumps(pair[1]))):
            assert type(clone.base_model.model.up) is FusedLinear
            with torch.no_grad():
                assert torch.equal(clone(x), pair[1](x))
                clone.base_model.model.up.lora_A.default.weight.zero_()
                assert not torch.equal(clone(x), pair[1](x))
                names = BATCHES[0]
                close(pair[1](x, adapter_names=names), pair[0](x, adapter_names=names))
        assert calls.slow == 0

    def test_saved_and_loaded(self, pair, tmp_path):
        pair[1].save_pretrained(tmp_path)
        base = Net()
        base.load_state_dict({k: pair[1].state_dict()[f"base_model.model.{k.replace('.', '.base_layer.', 1)}"]
                              for k in base.state_dict()})  # fmt: skip
        loaded = PeftModel.from_pretrained(base, tmp_path)
        loaded.load_adapter(tmp_path / "low", "low")
        assert type(loaded.base_model.model.up) is PeftLinear
        x = torch.randn(4, K)
        assert torch.equal(loaded(x), pair[0](x))
        lk.patch(loaded)
        with torch.no_grad():
            assert torch.equal(loaded(x), pair[1](x))
            close(loaded(x, adapter_names=["low"] * 4), pair[0](x, adapter_names=["low"] * 4))

    @pytest.mark.parametrize("reentrant", (True, False))
    def test_gradient_checkpointing(self, calls, reentrant):
        model = llama()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        oracle, model, _ = both(model)
        for m in (oracle, model):
            m(TOKENS, labels=TOKENS).loss.backward()
        expected = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
        close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
        assert len(expected) == 2 * LLAMA_LAYERS
        assert calls.slow == 0
        assert calls.fast >= 2 * LLAMA_LAYERS - 2  # forward and recomputation, which stops early if not reentrant


class TestPatch:
    def test_touches_nothing_but_classes(self):
        model = adapters()
        seen = []
        up = model.base_model.model.up
        up.register_forward_hook(lambda *_: seen.append("first"))
        up.register_forward_hook(lambda *_: seen.append("second"), prepend=True)
        before = {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()}
        state = model.state_dict(keep_vars=True)
        x = torch.randn(4, K)
        expected = model(x)

        handle = lk.patch(model)
        assert type(up) is FusedLinear
        patched = model.state_dict(keep_vars=True)
        assert list(patched) == list(state)
        assert all(patched[k] is state[k] for k in state)
        model(x)
        model(x, adapter_names=["low"] * 4)

        handle.unpatch()
        handle.unpatch()
        after = {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()}
        assert after == before
        seen.clear()
        assert torch.equal(model(x), expected)
        assert seen == ["second", "first"]

    def test_patching_twice_changes_nothing_more(self):
        model = net()
        first, second = lk.patch(model), lk.patch(model)
        assert type(model.base_model.model.up) is FusedLinear
        assert first.report() == second.report()
        first.unpatch()
        assert second.report().fast == 0

    def test_hooks_on_the_layer_still_run(self, calls):
        oracle, model, _ = both(net())
        for m in (oracle, model):
            m.base_model.model.up.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            m.base_model.model.up.register_full_backward_hook(lambda module, gi, go: (gi[0] * 3,))
        x = torch.randn(4, K)
        close(trained(model, x), trained(oracle, x))
        assert calls.take() == (2, 0)

    def test_refuses_what_has_no_lora_layer(self):
        with pytest.raises(ValueError, match="no PEFT LoRA layer"):
            lk.patch(Net())
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            lk.patch("model")

    def test_strict(self):
        model = net()
        model.base_model.model.up.lora_A.default.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"1 of 2(.|\n)*model\.up: adapter 'default': lora_A has hooks"):
            lk.patch(model, strict=True)
        assert type(model.base_model.model.down) is PeftLinear
        assert lk.patch(net(), strict=True).report().fast == 2

    def test_says_when_nothing_runs_fast(self, caplog):
        with caplog.at_level("WARNING", "lora_kernels"):
            lk.patch(net(lora_dropout=0.5).train())
        assert "none of the 2 LoRA layers runs fast; 2: adapter 'default': dropout in training" in caplog.text

    def test_report(self):
        model = llama()
        handle = lk.patch(model)
        layers = model.base_model.model.model.layers
        layers[1].self_attn.q_proj.lora_B.default.register_forward_hook(lambda *_: None)
        report = handle.report()
        assert (report.fast, report.total) == (LLAMA_LAYERS - 1, LLAMA_LAYERS)
        name = "base_model.model.model.layers.1.self_attn.q_proj"
        assert report.layers[name] == "adapter 'default': lora_B has hooks"
        assert report.classes[name] == "FusedLinear"
        text = str(report)
        assert text.startswith("13 of 14 LoRA layers fast (active default; eval mode; gradients on)")
        assert "    13  fast                                 FusedLinear" in text
        assert "     2  base_model.model.model.layers.*.self_attn.k_proj  fast" in text
        assert "13 of 14" in repr(handle)

    def test_class_of_a_wrapper_is_kept(self, calls):
        class Wrapper:
            marker = "wrapped"

        model = net()
        up, down = model.base_model.model.up, model.base_model.model.down
        up.__class__ = type("WrappedLinear", (Wrapper, PeftLinear), {})  # as FSDP2 does, before
        before = type(up)
        x = torch.randn(4, K)
        expected = model(x)
        handle = lk.patch(model)
        down.__class__ = type("WrappedFused", (Wrapper, type(down)), {"own": 1})  # and after
        with torch.no_grad():
            close(model(x), expected)
        assert calls.take() == (2, 0)
        assert isinstance(up, Wrapper)
        handle.unpatch()
        assert type(up) is before
        assert not isinstance(down, FusedMixin)
        assert (down.marker, down.own) == ("wrapped", 1)
        assert torch.equal(model(x), expected)

    def test_unforeseen_refusal_goes_to_peft_and_is_told(self, monkeypatch, caplog):
        oracle, model, _ = both(net())

        def refuse(*_):
            raise RuntimeError("no room")

        monkeypatch.setattr(_peft_layer, "linear", refuse)
        _peft_layer._warn_once.cache_clear()
        x = torch.randn(4, K)
        with torch.no_grad(), caplog.at_level("WARNING", "lora_kernels"):
            assert torch.equal(model(x), oracle(x))
        assert caplog.text.count("RuntimeError: no room") == 1

    def test_bad_input_raises_what_peft_raises(self):
        oracle, model, _ = both(net())
        for x in (torch.randn(4, K + 1), torch.randn(4, K).bfloat16(), torch.randint(9, (4, K))):
            with pytest.raises(RuntimeError) as expected:
                oracle(x)
            with pytest.raises(RuntimeError) as actual:
                model(x)
            assert str(actual.value) == str(expected.value)

    def test_without_a_kernel_peft_runs(self, monkeypatch, calls):
        oracle, model, handle = both(net())
        monkeypatch.setattr(_peft_layer, "_compiled", False)
        monkeypatch.setattr(_peft_layer, "extension_error", "never built")
        monkeypatch.setattr(_dispatch.Op, "backends", lambda self: frozenset({"reference"}))
        token = _dispatch._forced.set(None)
        try:
            x = torch.randn(4, K)
            assert torch.equal(model(x), oracle(x))
            assert calls.take() == (0, 2)
            assert handle.report().layers["base_model.model.up"] == "no cpu kernel here (never built)"
        finally:
            _dispatch._forced.reset(token)

    def test_backend_that_cannot_be_forced_raises(self):
        model = net()
        lk.patch(model)
        with torch.no_grad(), lk.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' does not run on cpu"):
            model(torch.randn(4, K))


def _up(model):
    return model.base_model.model.up


def _hook(module):
    module.register_forward_hook(lambda m, args, y: y * 1.5)


def _instance_forward(module):
    module.forward = lambda x, f=module.forward, **kwargs: f(x, **kwargs) * 1.5


class _Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class _Tagged(torch.Tensor):
    """Its results are tagged too."""


def _tagged(weight):
    return nn.Parameter(weight.detach().as_subclass(_Tagged), weight.requires_grad)


def _swap_class(module, cls):
    module.__class__ = cls


def _release(module):
    """What ZeRO-3 does: an empty parameter, gathered by a hook for the time of the module's call."""
    full = module.weight.data.clone()
    module.weight.data = torch.empty(0)
    module.register_forward_pre_hook(lambda m, args: setattr(m.weight, "data", full))
    module.register_forward_hook(lambda m, args, y: setattr(m.weight, "data", torch.empty(0)))


def _gather_above(model):
    """The same with the hooks on the layer above, so that only the parameter's size tells, between the calls."""
    _up(model).lora_A.default.weight.data = torch.empty(0)


CHANGES = {
    "hook on lora_A": (lambda m: _hook(_up(m).lora_A.default), "lora_A has hooks"),
    "hook on lora_B": (lambda m: _hook(_up(m).lora_B.default), "lora_B has hooks"),
    "backward hook on lora_B": (
        lambda m: _up(m).lora_B.default.register_full_backward_hook(lambda mod, gi, go: (2 * gi[0],)),
        "lora_B has hooks",
    ),
    "hook on dropout": (lambda m: _hook(_up(m).lora_dropout.default), "dropout has hooks"),
    "hook on base": (lambda m: _hook(_up(m).base_layer), "base layer has hooks"),
    "pre-hook on base": (
        lambda m: _up(m).base_layer.register_forward_pre_hook(lambda mod, args: (args[0] + 1,)),
        "base layer has hooks",
    ),
    "forward of base replaced": (
        lambda m: _instance_forward(_up(m).base_layer),
        "base layer: its forward",
    ),
    "forward of lora_A replaced": (
        lambda m: _instance_forward(_up(m).lora_A.default),
        "lora_A: its forward",
    ),
    "other base class": (lambda m: _swap_class(_up(m).base_layer, _Doubling), "base layer is _Doubling"),
    "other lora_A class": (lambda m: _swap_class(_up(m).lora_A.default, _Doubling), "lora_A is _Doubling"),
    "other lora_B class": (lambda m: _swap_class(_up(m).lora_B.default, _Doubling), "lora_B is _Doubling"),
    "base weight of a subclass": (
        lambda m: setattr(_up(m).base_layer, "weight", _tagged(_up(m).base_layer.weight)),
        "base layer: its weight is _Tagged",
    ),
    "lora_A with a bias": (
        lambda m: _up(m).lora_A.default.register_parameter("bias", nn.Parameter(torch.ones(4))),
        "lora_A has a bias",
    ),
    "custom dropout": (lambda m: _up(m).lora_dropout.update({"default": nn.Hardtanh()}), "dropout is Hardtanh"),
    "parametrized base": (
        lambda m: nn.utils.parametrizations.weight_norm(_up(m).base_layer),
        "base layer is ParametrizedLinear",
    ),
    "weight-normed lora_B": (
        lambda m: nn.utils.parametrizations.weight_norm(_up(m).lora_B.default),
        "lora_B is ParametrizedLinear",
    ),
    "base weight requires grad": (
        lambda m: _up(m).base_layer.weight.requires_grad_(),
        "base weight requires grad",
    ),
    "lora_A of a subclass": (
        lambda m: setattr(_up(m).lora_A.default, "weight", _tagged(_up(m).lora_A.default.weight)),
        "lora_A: its weight is _Tagged",
    ),
    "ZeRO-3 lora_A": (lambda m: _release(_up(m).lora_A.default), "lora_A has hooks"),
    "ZeRO-3 base": (lambda m: _release(_up(m).base_layer), "base layer has hooks"),
    "tensor scaling": (lambda m: _up(m).scaling.update(default=torch.tensor(0.7)), "scaling is a Tensor"),
    "adapters in bf16": (
        lambda m: (_up(m).lora_A.default.bfloat16(), _up(m).lora_B.default.bfloat16()),
        "lora_A is bfloat16, the input float32",
    ),
}


class TestFallback:
    """Each thing the kernels don't take is noticed at the call, goes to PEFT with the same result, and is named."""

    def check(self, pair, calls, reason, fast=1, slow=1, x=None):
        oracle, model, handle = pair
        x = torch.randn(4, K) if x is None else x
        calls.take()
        run = trained if torch.is_grad_enabled() else lambda m, x: m(x)
        torch.manual_seed(3)
        expected = run(oracle, x)
        torch.manual_seed(3)
        close(run(model, x), expected)
        assert calls.take() == (fast, slow)
        assert reason in handle.report().layers["base_model.model.up"]

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("when", ("before", "after"))
    def test_layer_changed(self, calls, change, when):
        released = change.startswith("ZeRO-3")
        fast = 0 if change.endswith("of a subclass") else 1  # the input of the layer behind it is tagged
        change, reason = CHANGES[change]
        model = net()
        oracle = copy.deepcopy(model)
        if when == "after":
            lk.patch(model)
        for m in (oracle, model):
            change(m)
        with torch.set_grad_enabled(not released):
            self.check((oracle, model, lk.patch(model)), calls, reason, fast, 2 - fast)

    @pytest.mark.parametrize(
        "change",
        (
            "hook on lora_A",
            "hook on lora_B",
            "hook on dropout",
            "hook on base",
            "forward of lora_A replaced",
            "other lora_A class",
            "tensor scaling",
        ),
    )
    def test_layer_changed_in_a_mixed_batch(self, calls, change):
        change, _ = CHANGES[change]
        pair = both(adapters())
        for m in pair[:2]:
            change(m)
        x = torch.randn(4, K)
        with torch.no_grad():
            close(pair[1](x, adapter_names=BATCHES[0]), pair[0](x, adapter_names=BATCHES[0]))
        assert calls.take() == (1, 1)

    @pytest.mark.parametrize(
        ("kwargs", "reason"),
        (
            (dict(lora_dropout=0.5), "dropout in training"),
            (dict(use_dora=True), "Dora variant"),
            (dict(lora_bias=True), "lora_B has a bias"),
        ),
    )
    def test_configured(self, calls, kwargs, reason):
        model = net(bias=True, **kwargs)
        if kwargs.get("lora_bias"):
            nn.init.normal_(_up(model).lora_B.default.bias)
        pair = both(model)
        for m in pair[:2]:
            m.train()
        self.check(pair, calls, f"adapter 'default': {reason}", 0, 2)

    def test_dropout_is_fast_in_eval(self, calls):
        oracle, model, handle = both(net(lora_dropout=0.5))
        x = torch.randn(4, K)
        close(trained(model, x), trained(oracle, x))
        assert calls.take() == (2, 0)
        model.train()
        assert handle.report().fast == 0
        model.eval()
        assert handle.report().fast == 2

    def test_only_the_adapter_concerned_is_slow(self, calls):
        model = net()
        model.add_adapter("dora", config(use_dora=True))
        pair = both(model)
        for active, expected in (("default", (2, 0)), ("dora", (0, 2)), ("default", (2, 0))):
            for m in pair[:2]:
                m.set_adapter(active)
            x = torch.randn(4, K)
            close(pair[1](x), pair[0](x))
            assert calls.take() == expected

    def test_dora_in_a_mixed_batch_raises_as_peft_does(self):
        _, model, _ = both(net(use_dora=True))
        with pytest.raises(ValueError, match="when DoRA is enabled"):
            model(torch.randn(4, K), adapter_names=["default"] * 4)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    def test_autocast(self, calls, dtype):
        pair = both(net())
        with torch.autocast("cpu", dtype):
            self.check(pair, calls, "autocast is on", 0, 2)

    def test_fp64(self, calls):
        pair = both(net(torch.float64))
        self.check(pair, calls, "input is float64", 0, 2, x=torch.randn(4, K).double())

    def test_global_hooks(self, calls):
        pair = both(net())
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, y: y * 1.5 if isinstance(m, nn.Linear) else y
        )
        try:
            self.check(pair, calls, "global module hooks", 0, 2)
        finally:
            handle.remove()

    def test_functional_call_and_transforms(self, calls):
        oracle, model, _ = both(net())
        x = torch.randn(4, K)
        close(torch.func.vmap(model)(x), torch.func.vmap(oracle)(x))
        close(torch.func.jvp(model, (x,), (x,)), torch.func.jvp(oracle, (x,), (x,)))
        tensors = {n: torch.randn_like(p) for n, p in model.named_parameters()}
        close(torch.func.functional_call(model, tensors, (x,)), torch.func.functional_call(oracle, tensors, (x,)))
        assert calls.take() == (0, 6)

    def test_forward_mode_differentiation(self, calls):
        oracle, model, handle = both(net())
        x, t = torch.randn(4, K), torch.randn(4, K)
        with forward_ad.dual_level():
            close(forward_ad.unpack_dual(model(forward_ad.make_dual(x, t))).tangent,
                  forward_ad.unpack_dual(oracle(forward_ad.make_dual(x, t))).tangent)  # fmt: skip
            assert (
                handle.report().layers["base_model.model.up"] == "global module hooks or forward-mode differentiation"
            )
        assert calls.take() == (0, 2)

    def test_input_subclass(self, calls):
        oracle, model, _ = both(net())
        x = torch.randn(4, K).as_subclass(_Tagged)
        close(model(x), oracle(x))
        assert calls.take() == (0, 2)

    def test_input_dtype_casting_disabled(self, calls):
        pair = both(net())
        with disable_input_dtype_casting(pair[0]), disable_input_dtype_casting(pair[1]):
            self.check(pair, calls, "input dtype casting is disabled", 0, 2)

    def test_extra_arguments(self, calls):
        oracle, model, _ = both(net())
        x = torch.randn(4, K)
        close(_up(model)(x, alora_offsets=None), _up(oracle)(x, alora_offsets=None))
        assert calls.take() == (0, 0)
        for m in (oracle, model):
            with pytest.raises(TypeError, match="positional argument"):
                _up(m)(x, x)

    def test_released_parameter_without_hooks(self, calls):
        """An empty factor is refused, and the error is PEFT's."""
        oracle, model, handle = both(net())
        for m in (oracle, model):
            _gather_above(m)
        x = torch.randn(4, K)
        with pytest.raises(RuntimeError) as expected:
            oracle(x)
        with pytest.raises(RuntimeError) as actual:
            model(x)
        assert str(actual.value) == str(expected.value)
        assert "its weight is [0] here" in handle.report().layers["base_model.model.up"]

    def test_dtensor(self, calls):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            oracle, model, handle = both(net())
            mesh = DeviceMesh("cpu", [0])
            for m in (oracle, model):
                for factor in (_up(m).lora_A.default, _up(m).lora_B.default):
                    factor.weight = nn.Parameter(distribute_tensor(factor.weight.detach(), mesh, [Replicate()]))
                    factor.register_forward_pre_hook(lambda mod, args: (torch.distributed.tensor.DTensor.from_local(
                        args[0], mesh, [Replicate()]) if not hasattr(args[0], "to_local") else args[0],))  # fmt: skip
                _up(m).lora_B.default.register_forward_hook(lambda mod, args, y: y.to_local())
            x = torch.randn(4, K)
            with torch.no_grad():
                close(model(x), oracle(x))
            assert calls.take() == (1, 1)
            for factor in (_up(model).lora_A.default, _up(model).lora_B.default):
                factor._forward_pre_hooks.clear()
                factor._forward_hooks.clear()
            assert "its weight is DTensor" in handle.report().layers["base_model.model.up"]
        finally:
            torch.distributed.destroy_process_group()

    def test_fsdp2(self, calls):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            for order in ("shard first", "patch first"):
                model = net()
                oracle = copy.deepcopy(model)
                steps = [lambda m=model: torch.distributed.fsdp.fully_shard(_up(m), mesh=DeviceMesh("cpu", [0])),
                         lambda m=model: lk.patch(m)]  # fmt: skip
                for step in steps if order == "shard first" else reversed(steps):
                    step()
                x = torch.randn(4, K)
                y = model(x)
                y.sum().backward()
                expected = oracle(x)
                expected.sum().backward()
                close(y, expected)
                grad = _up(model).lora_A.default.weight.grad
                close(grad.full_tensor(), _up(oracle).lora_A.default.weight.grad)
                assert calls.take() == (2, 0)
        finally:
            torch.distributed.destroy_process_group()

    def test_other_layers(self, calls):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(16, K)
                self.up = transformers.pytorch_utils.Conv1D(N, K)
                self.down = nn.Linear(N, K)

            def forward(self, ids):
                return self.down(self.up(self.embed(ids)))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(Mixed(), config(targets=("embed", "up", "down"), fan_in_fan_out=True))
        oracle, model, handle = both(model)
        ids = torch.randint(16, (4, 3))
        close(model(ids), oracle(ids))
        assert calls.take() == (1, 1)
        report = handle.report()
        assert report.layers == {
            "base_model.model.embed": "Embedding is not PEFT's LoRA over torch.nn.Linear",
            "base_model.model.up": "base layer is Conv1D, not torch.nn.Linear",
            "base_model.model.down": FAST,
        }
        assert (report.fast, report.total) == (1, 3)

    def test_subclass_with_its_own_forward(self, calls):
        class Louder(PeftLinear):
            def forward(self, x, *args, **kwargs):
                return 3 * super().forward(x, *args, **kwargs)

        model = net()
        _up(model).__class__ = Louder
        oracle, model, handle = both(model)
        x = torch.randn(4, K)
        close(model(x), oracle(x))
        assert type(_up(model)) is Louder
        assert "has its own forward" in handle.report().layers["base_model.model.up"]

    def test_instance_forward_on_the_layer(self, calls):
        model = net()
        _instance_forward(_up(model))
        handle = lk.patch(model)
        model(torch.randn(4, K))
        assert calls.take() == (1, 0)
        assert "forward was replaced on the instance" in handle.report().layers["base_model.model.up"]

    def test_accelerate_hook_after_patching_stays_fast(self, calls):
        hooks = pytest.importorskip("accelerate.hooks")
        model = net()
        handle = lk.patch(model)
        hooks.add_hook_to_module(_up(model), hooks.ModelHook())
        with contextlib.suppress(AttributeError):
            model(torch.randn(4, K))
        assert calls.take() == (2, 0)
        assert handle.report().fast == 2
