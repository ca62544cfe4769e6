import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.nn import FourierFTLinear, WaveFTLinear
from lora_kernels.testing import assert_within_rule, bitwise_equal

K, N, COUNT = 24, 41, 60
EACH = pytest.mark.parametrize("cls", (FourierFTLinear, WaveFTLinear))


def filled(layer):
    """The layer with values that are not zero."""
    nn.init.normal_(layer.values)
    return layer


def peft_layer(base, cls, n, **options):
    """PEFT's, with its own defaults where there are none here."""
    peft = pytest.importorskip("peft")
    config = {FourierFTLinear: peft.FourierFTConfig, WaveFTLinear: peft.WaveFTConfig}[cls]
    of = __import__(f"peft.tuners.{'fourierft' if cls is FourierFTLinear else 'waveft'}.layer", fromlist=["layer"])
    return getattr(of, cls.__name__)(base, "default", config(**options), n_frequency=n).train()


def spectrum(layer):
    return (layer.fourierft_spectrum if hasattr(layer, "fourierft_spectrum") else layer.waveft_spectrum)["default"]


@pytest.mark.parametrize(
    "cls, ours, theirs",
    (
        (FourierFTLinear, {}, {}),
        (FourierFTLinear, {"scaling": 20, "seed": 3}, {"scaling": 20.0, "random_loc_seed": 3}),
        (WaveFTLinear, {}, {}),
        (WaveFTLinear, {"scaling": 2.5, "seed": 4}, {"scaling": 2.5, "random_loc_seed": 4}),
        (WaveFTLinear, {"idwt": False}, {"use_idwt": False}),
    ),
)
@pytest.mark.parametrize("bias", (True, False))
def test_is_pefts_layer(route, cls, ours, theirs, bias):
    """Of the same values: y, its gradients and ΔW."""
    base = nn.Linear(K, N, bias=bias)
    layer, peer = filled(cls(base, COUNT, **ours)), peft_layer(copy.deepcopy(base), cls, COUNT, **theirs)
    spectrum(peer).data.copy_(layer.values.detach())
    x, dy = torch.randn(2, 6, K, requires_grad=True), torch.randn(2, 6, N)
    found = []
    for y, values in ((layer(x), layer.values), (peer(x), spectrum(peer))):
        found.append((y, *torch.autograd.grad(y, (x, values), dy)))
    delta = peer.get_delta_weight("default").detach()
    W = base.weight.detach().double() + lk.spectral_delta_weight(
        layer.values.detach().double(), layer.plan, kind=layer.kind, scale=layer.scale
    )
    want = x.detach().double() @ W.T + (base.bias.detach().double() if bias else 0)
    noise = K**0.5 * 2**-24 * float((x.detach().double().square() @ W.square().T).sqrt().square().mean().sqrt())
    assert_within_rule(found[0][0].detach(), want, found[1][0].detach(), noise=noise)
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.delta_weight().detach(), delta, rtol=1e-4, atol=1e-5)
    assert delta.norm() > 0.1


@EACH
def test_initialisation_and_defaults_are_pefts(cls):
    torch.manual_seed(0)
    layer = cls.from_linear(nn.Linear(80, 90))
    peer = peft_layer(nn.Linear(80, 90), cls, layer.values.numel())
    peft = pytest.importorskip("peft")
    defaults = (peft.FourierFTConfig if cls is FourierFTLinear else peft.WaveFTConfig)()
    assert layer.values.shape == (defaults.n_frequency,)
    assert layer.scale == defaults.scaling
    assert layer.seed == defaults.random_loc_seed
    assert layer.values.dtype == spectrum(peer).dtype == torch.float32
    places = peer.indices if cls is FourierFTLinear else peer.waveft_indices
    assert torch.equal(torch.stack((layer.plan.rows, layer.plan.cols)), places["default"])
    spread = float(spectrum(peer).detach().std())
    assert abs(float(layer.values.detach().std()) - spread) <= 0.1 * spread


def test_waveft_starts_as_its_base():
    base = nn.Linear(K, N)
    layer = WaveFTLinear.from_linear(base, COUNT)
    x = torch.randn(3, K)
    assert torch.equal(layer(x), base(x))
    filled(layer).reset_parameters()
    assert not layer.values.any()


@EACH
def test_only_the_values_are_trained(route, cls):
    base = nn.Linear(K, N)
    layer = filled(cls.from_linear(base, COUNT))
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["values"]
    layer(torch.randn(6, K)).square().sum().backward()
    assert layer.values.grad.abs().max() > 0
    assert layer.weight.grad is None


@EACH
def test_training_finds_the_values_of_another(route, cls):
    base, x = nn.Linear(K, N), torch.randn(200, K)
    with torch.no_grad():
        target = filled(cls(base, COUNT, scaling=20.0))(x)
    layer = cls(base, COUNT, scaling=20.0)
    optimizer = torch.optim.Adam([layer.values], lr=0.1)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


@EACH
@pytest.mark.parametrize("masters", (torch.float32, torch.bfloat16))
def test_bf16(route, cls, masters):
    layer = filled(cls(nn.Linear(K, N).bfloat16(), COUNT, dtype=masters))
    assert layer.values.dtype == masters
    x = torch.randn(64, K).bfloat16()
    y = layer(x)
    assert y.dtype == layer.delta_weight().dtype == torch.bfloat16
    base = nn.functional.linear(x, layer.weight, layer.bias)
    delta = lk.spectral_delta_weight(layer.values.detach().double(), layer.plan, kind=layer.kind, scale=layer.scale)
    want = x.double() @ (layer.weight.double() + delta).T + layer.bias.double()
    plain = base + nn.functional.linear(x, delta.bfloat16())
    assert_within_rule(y.detach(), want, plain.detach())


@EACH
class TestState:
    def test_state_dict(self, cls):
        layer = filled(cls(nn.Linear(K, N), COUNT))
        other = cls(nn.Linear(K, N), COUNT)
        assert sorted(layer.state_dict()) == ["bias", "values", "weight"]
        other.load_state_dict(layer.state_dict())
        x = torch.randn(6, K)
        assert bitwise_equal(other(x), layer(x))

    def test_a_state_of_another_n_is_refused(self, cls):
        layer = cls(nn.Linear(K, N), COUNT)
        before = layer.values.detach().clone()
        with pytest.raises(RuntimeError, match=r"size mismatch for values.*\[61\].*\[60\]"):
            layer.load_state_dict(cls(nn.Linear(K, N), COUNT + 1).state_dict())
        assert torch.equal(layer.values, before)

    def test_copies_and_pickles(self, cls):
        layer = filled(cls(nn.Linear(K, N), COUNT))
        x = torch.randn(6, K)
        copied = copy.deepcopy(layer)
        assert copied.plan is layer.plan
        for twin in (copied, pickle.load(io.BytesIO(pickle.dumps(layer)))):
            assert bitwise_equal(twin(x), layer(x))

    def test_another_dtype_and_device(self, cls):
        layer = filled(cls(nn.Linear(K, N), COUNT))
        values = layer.values.detach().clone()
        assert layer.bfloat16()(torch.randn(6, K).bfloat16()).dtype == torch.bfloat16
        assert layer.to("meta").plan.device.type == "meta"
        layer.to_empty(device="cpu").float()
        layer.load_state_dict({**cls(nn.Linear(K, N), COUNT).state_dict(), "values": values})
        assert layer.plan.device.type == "cpu"
        assert layer(torch.randn(6, K)).isfinite().all()

    def test_made_on_meta(self, cls):
        base = nn.Linear(K, N)
        with torch.device("meta"):
            layer = cls(nn.Linear(K, N), COUNT)
        assert layer.values.is_meta
        layer = layer.to_empty(device="cpu")
        twin = filled(cls(base, COUNT))
        layer.load_state_dict(twin.state_dict())
        x = torch.randn(6, K)
        assert bitwise_equal(layer(x), twin(x))

    def test_repr(self, cls):
        kind, scale = ("fourier", 150) if cls is FourierFTLinear else ("haar", 25)
        text = f"{cls.__name__}(in_features=24, out_features=41, n=60, kind={kind}, scale={scale})"
        assert repr(cls(nn.Linear(K, N), COUNT)) == text


@EACH
def test_bad_arguments_leave_the_base_as_it_is(cls):
    base = nn.Linear(K, N)
    for n in (0, -1, K * N + 1, 2.0):
        with pytest.raises(ValueError, match=rf"n must be from 1 to {K * N}"):
            cls(base, n)
    assert base.weight.requires_grad
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear, got Conv1d"):
        cls(nn.Conv1d(K, N, 1), 4)
