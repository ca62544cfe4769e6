import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.nn import DoRALinear, LoRALinear, MultiLoRALinear
from lora_kernels.reference.dropout import dropout_mask, keep_scale
from lora_kernels.testing import bitwise_equal, threads

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

    @pytest.mark.parametrize("cls", (LoRALinear, DoRALinear))
    def test_bad_arguments(self, cls):
        for rank in (0, -1, 2.0):
            with pytest.raises(ValueError, match="rank must be an int >= 1"):
                cls(nn.Linear(K, N), rank)
        for dropout in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="dropout must be a probability"):
                cls(nn.Linear(K, N), 4, dropout=dropout)
        with pytest.raises(TypeError, match=r"torch\.nn\.Linear, got Conv1d"):
            cls(nn.Conv1d(K, N, 1), 4)

    @pytest.mark.parametrize("cls", (LoRALinear, DoRALinear))
    def test_rank_stabilised_scaling(self, cls):
        assert cls(nn.Linear(K, N), 16, 8.0, rslora=True).scaling == 2.0
        assert cls.from_linear(nn.Linear(K, N), 16, 8.0, rslora=True).scaling == 2.0
        assert cls(nn.Linear(K, N), 16, rslora=True).scaling == 4.0
        assert cls(nn.Linear(K, N), 16).scaling == 1.0

    def test_dropout(self, route):
        """In training mode, by a seed from torch's generator; gradients too."""
        layer = filled(LoRALinear.from_linear(nn.Linear(K, N), 4, 3.0, dropout=0.4))
        x = torch.randn(6, K, requires_grad=True)
        close(layer.eval()(x), formula(x, layer, layer.A, layer.B, 0.75))
        torch.manual_seed(2)
        y = layer.train()(x)
        torch.manual_seed(2)
        mask = dropout_mask(torch.randint(2**63 - 1, (1,)), 6, K, 0.4)
        base = nn.functional.linear(x, layer.weight, layer.bias).double()
        kept = x.double() * mask * keep_scale(0.4)
        want = base + 0.75 * (kept @ layer.A.double().T) @ layer.B.double().T
        close(y, want)
        assert not torch.equal(layer(x), y)
        leaves = (x, layer.A, layer.B)
        got, exact = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, want))
        for g, w in zip(got, exact, strict=True):
            close(g, w, rtol=1e-4)

    def test_repr(self):
        text = repr(LoRALinear(nn.Linear(K, N), 4, 8))
        assert text == "LoRALinear(in_features=24, out_features=40, rank=4, scaling=2)"
        assert repr(LoRALinear(nn.Linear(K, N), 4, dropout=0.5)).endswith("scaling=1, dropout=0.5)")
        assert repr(DoRALinear(nn.Linear(K, N), 4, 8)) == text.replace("LoRA", "DoRA")


def dora_formula(x, layer, mask=None):
    """DoRA in float64, as PEFT has it."""
    W, A, B, m = (t.double() for t in (layer.weight, layer.A, layer.B, layer.magnitude))
    x, s = x.double(), layer.scaling
    c = m / (W + s * B @ A).detach().norm(dim=1)
    bias = 0 if layer.bias is None else layer.bias.double()
    if mask is None:
        return c * (x @ W.T + s * x @ A.T @ B.T) + bias
    kept = x * mask * keep_scale(layer.dropout)
    return x @ W.T + bias + (c - 1) * (kept @ W.T) + c * s * (kept @ A.T @ B.T)


class TestDoRALinear:
    def make(self, dtype=torch.float32, **options):
        layer = filled(DoRALinear(nn.Linear(K, N), 4, 3.0, **options))
        with torch.no_grad():
            layer.magnitude.mul_(1 + 0.2 * torch.randn(N))
        return layer

    def test_starts_as_its_base(self, route):
        base = nn.Linear(K, N)
        layer = DoRALinear.from_linear(base, 4, 8)
        x = torch.randn(3, K)
        close(layer(x), base(x), rtol=1e-6)
        close(layer.magnitude, base.weight.norm(dim=1), rtol=1e-6)
        assert layer.weight is base.weight
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["A", "B", "magnitude"]
        with torch.no_grad():
            layer.magnitude.zero_()
        layer.reset_parameters()
        close(layer.magnitude, base.weight.norm(dim=1), rtol=1e-6)

    @pytest.mark.parametrize("bias", (True, False))
    @pytest.mark.parametrize("shape", ((K,), (6, K), (2, 3, K), (0, K)))
    def test_formula_and_gradients(self, route, bias, shape):
        layer = self.make()
        layer.bias = layer.bias if bias else None
        x = torch.randn(shape, requires_grad=True)
        y, want = layer(x), dora_formula(x, layer)
        assert y.shape == (*shape[:-1], N)
        close(y, want)
        leaves = (x, layer.A, layer.B, layer.magnitude)
        got, exact = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, want))
        for g, w in zip(got, exact, strict=True):
            close(g, w, rtol=1e-4)
        assert layer.weight.grad is None

    def test_dropout(self, route):
        layer = self.make(dropout=0.4)
        x = torch.randn(6, K, requires_grad=True)
        close(layer.eval()(x), dora_formula(x, layer))
        torch.manual_seed(2)
        y = layer.train()(x)
        torch.manual_seed(2)
        want = dora_formula(x, layer, dropout_mask(torch.randint(2**63 - 1, (1,)), 6, K, 0.4))
        close(y, want)
        leaves = (x, layer.A, layer.B, layer.magnitude)
        got, exact = (torch.autograd.grad(t.square().sum(), leaves) for t in (y, want))
        for g, w in zip(got, exact, strict=True):
            close(g, w, rtol=1e-4)

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    def test_bf16(self, route, dtype):
        layer = filled(DoRALinear(nn.Linear(K, N).bfloat16(), 4, dtype=dtype))
        assert layer.A.dtype == layer.B.dtype == layer.magnitude.dtype == dtype
        x = torch.randn(6, K).bfloat16()
        y = layer(x)
        assert y.dtype == torch.bfloat16
        close(y, dora_formula(x, layer), rtol=0.02)

    def test_copies_and_saves(self):
        layer, x = self.make(), torch.randn(6, K)
        y = layer(x)
        assert list(layer.state_dict()) == ["weight", "bias", "A", "B", "magnitude"]
        for assign in (False, True):
            other = DoRALinear(nn.Linear(K, N), 4, 3.0)
            other(x)
            other.load_state_dict(layer.state_dict(), assign=assign)
            assert bitwise_equal(other(x), y)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for other in (
            copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False),
        ):  # fmt: skip
            assert bitwise_equal(other(x), y)
            with torch.no_grad():
                other.weight.mul_(2)
            close(other(x), dora_formula(x, other))
            assert bitwise_equal(layer(x), y)

    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    def test_moves_to_another_dtype(self, dtype):
        layer, x = self.make(), torch.randn(6, K)
        before = layer(x)
        layer.to(dtype)
        close(layer(x.to(dtype)), dora_formula(x.to(dtype), layer), rtol=0.02)
        assert layer.weight_norm_sq.dtype == torch.float32
        close(layer.weight_norm_sq, layer.weight.double().square().sum(1), rtol=1e-6)
        close(layer.float()(x), before, rtol=0.05)
        close(layer.weight_norm_sq, layer.weight.double().square().sum(1), rtol=1e-6)

    def test_norms_are_kept_until_the_weight_changes(self):
        """However it changes."""
        layer, x = self.make(), torch.randn(6, K)
        layer(x)
        kept = layer.weight_norm_sq
        layer(x)
        assert layer.weight_norm_sq is kept
        with torch.no_grad():
            layer.magnitude.mul_(2)
            layer.A.mul_(2)
        close(layer(x), dora_formula(x, layer))
        assert layer.weight_norm_sq is kept

        def in_place():
            layer.weight.detach().mul_(1.5)

        def replaced():
            layer.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)

        def loaded():
            layer.load_state_dict({**layer.state_dict(), "weight": torch.randn(N, K)})

        def assigned():
            layer.load_state_dict({**layer.state_dict(), "weight": torch.randn(N, K)}, assign=True)
            layer.requires_grad_(False)

        def loaded_from_above():
            parent = nn.Sequential(layer)
            parent.load_state_dict({**parent.state_dict(), "0.weight": torch.randn(N, K)})

        def scaled_by_apply():
            layer._apply(lambda t: t * 1.1)

        for change in (in_place, replaced, loaded, assigned, loaded_from_above, scaled_by_apply):
            change()
            close(layer(x), dora_formula(x, layer))

    def test_one_step_of_training(self):
        """The loss falls, and only the adapter moves."""
        torch.manual_seed(1)
        layer = DoRALinear(nn.Linear(K, N), 4, dropout=0.1)
        weight = layer.weight.clone()
        x, target = torch.randn(64, K), torch.randn(64, N)
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(5):
            loss = (layer(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert bitwise_equal(layer.weight.detach(), weight)

    @pytest.mark.parametrize("dropout", (0.0, 0.5))
    def test_compiled(self, dropout):
        torch._dynamo.reset()
        layer, x = self.make(dropout=dropout), torch.randn(6, K)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        results = []
        for call in (compiled, layer):
            torch.manual_seed(3)
            y = call(x)
            leaves = (layer.A, layer.B, layer.magnitude)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for g, w in zip(*results, strict=True):
            close(g, w, rtol=1e-4)
        with torch.no_grad():
            layer.weight.mul_(2)
        layer.eval()
        close(compiled(x), dora_formula(x, layer))


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

    @pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
    @pytest.mark.parametrize("count", (1, 2))
    @pytest.mark.parametrize(("rows", "sizes"), ((50, (24, 40)), (300, (100, 136)), (300, (320, 512))))
    def test_an_adapters_gradients_are_those_of_its_own_run(self, rows, sizes, count, dtype, backend):
        """Bit for bit, with the rows of all adapters in any order."""
        in_features, out_features = sizes
        base = nn.Linear(in_features, out_features).to(dtype)
        layer = filled(MultiLoRALinear(base, 4, 8, 12.0))
        x, dy = torch.randn(rows, in_features).to(dtype), torch.randn(rows, out_features).to(dtype)
        ids = torch.randint(-1, 4, (rows,))
        ids[0] = 3

        def run(layer, chosen, ids):
            layer.zero_grad()
            with threads(count):
                layer(x[chosen], ids).backward(dy[chosen])
            return layer.A.grad, layer.B.grad

        together = run(layer, torch.arange(rows), ids)
        for l in range(4):
            chosen = (ids == l).nonzero()[:, 0]
            alone = MultiLoRALinear(base, 1, 8, 12.0)
            with torch.no_grad():
                alone.A.copy_(layer.A[l : l + 1])
                alone.B.copy_(layer.B[l : l + 1])
            for whole, own in zip(
                together, run(alone, chosen, torch.zeros(len(chosen), dtype=torch.int64)), strict=True
            ):
                assert own.abs().max() > 0
                assert bitwise_equal(whole[l], own[0])

    def test_unknown_adapter(self):
        with pytest.raises(IndexError, match="3"):
            self.make()(torch.randn(6, K), IDS + 1)

    def test_repr(self):
        text = repr(MultiLoRALinear(nn.Linear(K, N), 3, 4))
        assert text == "MultiLoRALinear(in_features=24, out_features=40, num_adapters=3, rank=4)"
