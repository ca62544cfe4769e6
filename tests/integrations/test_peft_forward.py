"""A patched layer with one or several active adapters: outputs, gradients, compilation; PEFT is the oracle."""

import copy

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from nets import K, adapters, both, close, config, net, trained  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations import _peft_reason  # noqa: E402
from lora_kernels.integrations.peft import FAST  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]


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
        assert handle.report().layers["base_model.model.down"] == (_peft_reason.INACTIVE if only_up else FAST)

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
