import copy
import math

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.nn import LoRALinear, MultiLoRALinear

K, N = 24, 40
IDS = torch.tensor([2, 0, -1, 1, 2, 2])


def filled(layer):
    """The layer with a B that is not zero."""
    nn.init.normal_(layer.B, std=0.1)
    return layer


def formula(x, layer, A, B, scaling):
    y = nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias if layer.bias is None else layer.bias.double()
    )
    return y + scaling * (x.double() @ A.double().T) @ B.double().T


def close(actual, expected, rtol=2e-5):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol)


class TestLoRALinear:
    def test_starts_as_its_base_with_pefts_initialisation(self):
        base = nn.Linear(K, N)
        layer = LoRALinear.from_linear(base, 4, 8)
        x = torch.randn(3, K)
        assert torch.equal(layer(x), base(x))
        assert layer.scaling == 2.0
        assert not layer.B.any()
        bound = 1 / math.sqrt(K)  # of kaiming_uniform_(a=√5)
        assert 0.5 * bound < layer.A.abs().max() <= bound

    @pytest.mark.parametrize("bias", (True, False))
    @pytest.mark.parametrize("shape", ((K,), (6, K), (2, 3, K), (0, K)))
    def test_formula(self, route, bias, shape):
        layer = filled(LoRALinear(nn.Linear(K, N, bias=bias), 5, 3.0))
        x = torch.randn(shape)
        y = layer(x)
        assert y.shape == (*shape[:-1], N)
        close(y, formula(x, layer, layer.A, layer.B, 0.6))

    def test_only_the_factors_are_trained(self, route):
        base = nn.Linear(K, N)
        layer = filled(LoRALinear.from_linear(base, 4))
        assert layer.weight is base.weight
        assert layer.bias is base.bias
        assert not base.weight.requires_grad
        x = torch.randn(6, K, requires_grad=True)
        layer(x).square().sum().backward()
        got = [x.grad, layer.A.grad, layer.B.grad]
        y = formula(x, layer, layer.A, layer.B, 1.0)
        for g, w in zip(got, torch.autograd.grad(y.square().sum(), (x, layer.A, layer.B)), strict=True):
            close(g, w, rtol=1e-4)
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]
        assert layer.weight.grad is None

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_bf16(self, route, dtype):
        layer = filled(LoRALinear(nn.Linear(K, N).bfloat16(), 4, dtype=dtype))
        assert layer.A.dtype == layer.B.dtype == dtype
        x = torch.randn(6, K).bfloat16()
        y = layer(x)
        assert y.dtype == torch.bfloat16
        close(y, formula(x, layer, layer.A, layer.B, 1.0), rtol=0.02)

    def test_copies_and_saves(self):
        layer = filled(LoRALinear(nn.Linear(K, N), 4))
        other = LoRALinear(nn.Linear(K, N), 4)
        other.load_state_dict(layer.state_dict())
        x = torch.randn(6, K)
        assert sorted(layer.state_dict()) == ["A", "B", "bias", "weight"]
        assert torch.equal(other(x), layer(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))

    def test_bad_arguments(self):
        for rank in (0, -1, 2.0):
            with pytest.raises(ValueError, match="rank must be an int >= 1"):
                LoRALinear(nn.Linear(K, N), rank)
        with pytest.raises(TypeError, match=r"torch\.nn\.Linear, got Conv1d"):
            LoRALinear(nn.Conv1d(K, N, 1), 4)

    def test_repr(self):
        text = repr(LoRALinear(nn.Linear(K, N), 4, 8))
        assert text == "LoRALinear(in_features=24, out_features=40, rank=4, scaling=2)"


class TestMultiLoRALinear:
    def make(self, bias=True):
        layer = filled(MultiLoRALinear.from_linear(nn.Linear(K, N, bias=bias), 3, 4, 8))
        layer.scaling.copy_(torch.tensor([2.0, 0.5, -1.0]))
        return layer

    def expected(self, layer, x):
        rows = []
        for row, i in zip(x.reshape(-1, K), IDS.tolist(), strict=True):
            B = layer.B[i] if i >= 0 else torch.zeros_like(layer.B[0])
            rows.append(formula(row, layer, layer.A[i], B, layer.scaling[i].double()))
        return torch.stack(rows).reshape(*x.shape[:-1], N)

    @pytest.mark.parametrize("bias", (True, False))
    @pytest.mark.parametrize("shape", ((6, K), (2, 3, K)))
    def test_each_row_has_its_own_adapter(self, route, bias, shape):
        layer = self.make(bias)
        x = torch.randn(shape)
        close(layer(x, IDS), self.expected(layer, x))
        assert torch.equal(layer(x, lk.BatchPlan.from_ids(IDS, 3)), layer(x, IDS))

    def test_starts_as_its_base(self):
        base = nn.Linear(K, N)
        layer = MultiLoRALinear(base, 3, 4)
        x = torch.randn(6, K)
        assert torch.equal(layer(x, IDS), base(x))
        assert layer.scaling.tolist() == [1.0, 1.0, 1.0]
        assert (layer.A.std((1, 2)) > 0).all()

    def test_gradients(self, route):
        layer = self.make()
        x = torch.randn(6, K, requires_grad=True)
        layer(x, IDS).square().sum().backward()
        got = [x.grad, layer.A.grad, layer.B.grad]
        want = torch.autograd.grad(self.expected(layer, x).square().sum(), (x, layer.A, layer.B))
        for g, w in zip(got, want, strict=True):
            close(g, w, rtol=1e-4)
        assert layer.weight.grad is None

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_bf16(self, route, dtype):
        layer = filled(MultiLoRALinear(nn.Linear(K, N).bfloat16(), 3, 4, dtype=dtype))
        x = torch.randn(6, K).bfloat16()
        y = layer(x, IDS)
        assert y.dtype == torch.bfloat16
        close(y, self.expected(layer, x), rtol=0.02)

    def test_unknown_adapter(self):
        with pytest.raises(IndexError, match="3"):
            self.make()(torch.randn(6, K), IDS + 1)

    def test_repr(self):
        text = repr(MultiLoRALinear(nn.Linear(K, N), 3, 4))
        assert text == "MultiLoRALinear(in_features=24, out_features=40, num_adapters=3, rank=4)"
