"""Mixed batches, PEFT's ``adapter_names``, against PEFT's own."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from nets import (  # noqa: E402
    BATCHES,
    LLAMA_LAYERS,
    TOKENS,
    K,
    adapters,
    both,
    close,
    config,
    llama,
    net,
    replace_forward,
    trained,
    up_of,
    warm,
)
from peft import get_peft_model  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations import _peft_batch, _peft_state  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]


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
        _peft_state.split.cache_clear()
        x, names = torch.randn(4, K), BATCHES[0]
        with torch.inference_mode():
            model(x, adapter_names=names)
        close(trained(model, x, adapter_names=names)[1], trained(oracle, x, adapter_names=names)[1])

    def test_compiled_goes_to_peft(self, unforced):
        oracle, model, _ = both(adapters())
        compiled = torch.compile(up_of(model), backend="eager", fullgraph=True)
        x = torch.randn(4, K)
        with torch.no_grad():
            for names in (BATCHES[0], BATCHES[1]):
                close(compiled(x, adapter_names=names), up_of(oracle)(x, adapter_names=names))

    def test_layers_get_the_names_without_hooks(self, calls):
        model = adapters()
        lk.patch(model)
        up = up_of(model)
        warm(model)
        calls.take()
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
            replace_forward(m.base_model.model.down)
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
            m.merge_adapter()
        assert message(model, ["low"] * 4) == message(oracle, ["low"] * 4)
