"""LoCA's layer and schedule against their formulas in float64."""

import copy
import pickle

import pytest
import torch
from scipy import fft
from torch import nn

import lora_kernels as lk
from lora_kernels.nn import LoCALinear, LoCASchedule
from lora_kernels.ops.location import spectral_linear_located
from lora_kernels.testing import bitwise_equal

K, N, COUNT = 24, 20, 12
ALPHA = 0.7


def make(fmt=None, trains="coefficients", dtype=torch.float32, **options):
    """A layer with values that are not zero, in the phase asked for."""
    base, more = nn.Linear(K, N).to(dtype), {}
    if fmt is not None:
        base, more = lk.quantize(base.weight.detach(), fmt), {"bias": base.bias}
    layer = LoCALinear(base, COUNT, LoCASchedule(1000), ALPHA, **more, **options)
    nn.init.normal_(layer.values)
    while layer.schedule.trains != trains:
        layer.schedule.step()
    return layer


def cosine(length):
    """The orthonormal DCT-II, [length, length]."""
    return torch.tensor(fft.dct(torch.eye(length, dtype=torch.float64).numpy(), norm="ortho", axis=0))


def places(layer):
    sizes = torch.tensor([[N - 1.0], [K - 1.0]])
    return (layer.locations.detach().clamp(0, 0.999) * sizes).round().long()


def formula(x, layer):
    weight = layer.base.weight
    W = weight.double() if isinstance(weight, torch.Tensor) else lk.dequantize(weight, torch.float32).double()
    S = torch.zeros(N, K, dtype=torch.float64).index_put(tuple(places(layer)), layer.values.double(), True)
    return x.double() @ (W + ALPHA * cosine(N).T @ S @ cosine(K)).T + layer.base.bias.double()


def location_slopes(x, dy, layer):
    """LoCA's gradient of λ: central differences of C (∂L/∂ΔW) Cᵀ, clamped; through (N - 1, K - 1) and the clamp."""
    D = ALPHA * cosine(N) @ (dy.double().reshape(-1, N).T @ x.double().reshape(-1, K)) @ cosine(K).T
    slopes = torch.zeros(2, COUNT, dtype=torch.float64)
    for i, (p, q) in enumerate(places(layer).T.tolist()):
        half = float(layer.values[i].detach()) / 2
        slopes[0, i] = half * (D[min(p + 1, N - 1), q] - D[max(p - 1, 0), q])
        slopes[1, i] = half * (D[p, min(q + 1, K - 1)] - D[p, max(q - 1, 0)])
    inside = (layer.locations >= 0) & (layer.locations <= 0.999)
    return slopes.clamp(-1, 1) * torch.tensor([[N - 1.0], [K - 1.0]]) * inside


def close(actual, expected, rtol=2e-5):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("fmt", (None, "nf4"))
@pytest.mark.parametrize("shape", ((K,), (2, 3, K), (0, K)))
def test_coefficients(route, fmt, shape):
    """y, and in this phase the gradients of x and the values, none of the locations."""
    layer, x = make(fmt), torch.randn(shape, requires_grad=True)
    y, want = layer(x), formula(x, layer)
    close(y, want)
    dy = torch.randn_like(y)
    y.backward(dy)
    dx, dvalues = torch.autograd.grad(want, (x, layer.values), dy.double())
    close(x.grad, dx)
    close(layer.values.grad, dvalues)
    assert layer.locations.grad is None


@pytest.mark.parametrize("fmt", (None, "nf4"))
@pytest.mark.parametrize("shape", ((K,), (2, 3, K), (0, K)))
def test_locations(route, fmt, shape):
    """And in this one those of x and the locations, clamped and not, none of the values."""
    layer, x = make(fmt, "locations"), torch.randn(shape, requires_grad=True)
    with torch.no_grad():  # beyond the clamp, at both ends of an axis, at one place, where differences reach 1
        layer.locations[:, :4] = torch.tensor([[-0.2, 1.3, 0.0, 0.99], [0.5, 0.0, 0.999, 0.2]])
        layer.locations[:, 5] = layer.locations[:, 4]
        layer.values[6:9] *= 30
    y, want = layer(x), formula(x, layer)
    close(y, want)
    dy = torch.randn_like(y)
    y.backward(dy)
    close(x.grad, torch.autograd.grad(want, x, dy.double())[0])
    slopes = location_slopes(x.detach(), dy, layer)
    close(layer.locations.grad, slopes)
    if y.numel():
        assert (slopes[:, 6:9].abs() >= N - 1).any()
        assert slopes[0, 0] == slopes[0, 1] == 0 != slopes[1, 0]
    assert layer.values.grad is None


def test_starts_as_its_base():
    linear = nn.Linear(K, N)
    layer = LoCALinear(linear, 500, LoCASchedule(10))
    x = torch.randn(3, K)
    assert torch.equal(layer(x), linear(x))
    assert layer.base is linear
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["values", "locations"]
    assert 0 <= layer.locations.min() < 0.05
    assert 0.95 < layer.locations.max() < 1
    one, two = (LoCALinear(linear, 5, LoCASchedule(10), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.locations, two.locations)


@pytest.mark.parametrize("trains", ("coefficients", "locations"))
@pytest.mark.parametrize("values", (torch.float32, torch.bfloat16))
def test_bf16(route, trains, values):
    layer = LoCALinear(nn.Linear(K, N).bfloat16(), COUNT, LoCASchedule(1000), ALPHA, dtype=values)
    nn.init.normal_(layer.values)
    while layer.schedule.trains != trains:
        layer.schedule.step()
    x = torch.randn(6, K).bfloat16()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, formula(x, layer), rtol=0.03)
    dy = torch.randn(6, N).bfloat16()
    y.backward(dy)
    if trains == "locations":
        assert layer.locations.grad.dtype == torch.float32
        close(layer.locations.grad, location_slopes(x, dy, layer), rtol=1e-2)
    else:
        assert layer.values.grad.dtype == values


@pytest.mark.parametrize("trains", ("coefficients", "locations"))
def test_autocast(trains):
    layer, x = make(trains=trains), torch.randn(6, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, formula(x, layer), rtol=0.05)
    y.float().sum().backward()


def published(iterations, learn_location_iter, coefficients=10, locations=20):
    """LoCA's own rule: it switches at 0 and 10 of every 30 iterations, and freezes locations for good at one."""
    trains, found = "coefficients", []
    for i in range(iterations):
        if i >= learn_location_iter or i % (coefficients + locations) == 0:
            trains = "coefficients"
        elif i % (coefficients + locations) == coefficients:
            trains = "locations"
        found.append(trains)
    return found


@pytest.mark.parametrize("until", (0, 5, 10, 11, 30, 75, 90, 1000))
@pytest.mark.parametrize("turns", ((10, 20), (1, 1), (3, 0)))
def test_schedule(until, turns):
    schedule = LoCASchedule(until, coefficient_steps=turns[0], location_steps=turns[1])
    found = []
    for i in range(130):
        assert schedule.iteration == i
        found.append(schedule.trains)
        schedule.step()
    assert found == published(130, until, *turns)


def test_schedule_goes_on_from_its_state():
    schedule = LoCASchedule(100, coefficient_steps=3, location_steps=4)
    for _ in range(5):
        schedule.step()
    state = schedule.state_dict()
    assert state == {"iteration": 5, "learn_location_iter": 100, "coefficient_steps": 3, "location_steps": 4}
    other = LoCASchedule(7)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert other.trains == schedule.trains == "locations"
    for bad, error in (
        ({**state, "iteration": -1}, ValueError),
        ({**state, "coefficient_steps": 0}, ValueError),
        ({**state, "more": 1}, ValueError),
        ({"iteration": 3}, ValueError),
        ({**state, "location_steps": 1.5}, TypeError),
    ):
        with pytest.raises(error):
            other.load_state_dict(bad)
        assert other.state_dict() == state


def train(layers, x, target, schedule, steps, optimizer, losses):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (sum(layer(x) for layer in layers) - target).square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())


def optimizer_of(layers):
    return torch.optim.Adam(
        [
            {"params": [layer.values for layer in layers], "lr": 0.05},
            {"params": [layer.locations for layer in layers], "lr": 2e-3},
        ]
    )


def test_training_moves_what_the_schedule_says_and_lowers_the_loss():
    """Of two layers that share a schedule."""
    schedule = LoCASchedule(70)
    layers = [LoCALinear(nn.Linear(K, N), 5 * COUNT, schedule) for _ in range(2)]
    x, target = torch.randn(64, K), torch.randn(64, N) + torch.linspace(-3, 3, N)
    optimizer, losses, moved = optimizer_of(layers), [], set()
    for trains in published(90, 70):
        before = [(layer.values.clone(), layer.locations.clone(), places(layer)) for layer in layers]
        train(layers, x, target, schedule, 1, optimizer, losses)
        for layer, (values, locations, at) in zip(layers, before, strict=True):
            assert torch.equal(layer.values, values) == (trains == "locations")
            assert torch.equal(layer.locations, locations) == (trains == "coefficients")
            moved |= {trains} if (places(layer) != at).any() else set()
    assert moved == {"locations"}
    assert losses[-1] < 0.9 * losses[0]


def test_a_step_along_the_locations_lowers_the_loss():
    """Of one coefficient a column away from where the target's stands."""
    x = torch.randn(200, K)
    layer = make(trains="locations")
    layer.values.data = layer.values.data[:1].fill_(0.05)
    layer.locations.data = torch.tensor([[0.5], [10.4 / (K - 1)]])
    S = torch.zeros(N, K, dtype=torch.float64)
    S[int(places(layer)[0]), 11] = 0.05
    target = (layer.base(x).double() + x.double() @ (ALPHA * cosine(N).T @ S @ cosine(K)).T).float()
    before = (layer(x) - target).square().sum()
    before.backward()
    step = 0.01 * layer.locations.grad.sign() * torch.tensor([[0.0], [1.0]])
    with torch.no_grad():
        layer.locations -= step
    after = (layer(x) - target).square().sum()
    assert places(layer)[1] == 11
    assert after < 1e-6 < before


def test_accumulation():
    """Values' gradients of parts add up to the whole's; locations' do where no difference reaches the clamp."""
    for trains, name in (("coefficients", "values"), ("locations", "locations")):
        layer, x = make(trains=trains), torch.randn(8, K)
        dy = 1e-3 * torch.randn(8, N)
        layer(x).backward(dy)
        whole = getattr(layer, name).grad.clone()
        getattr(layer, name).grad = None
        for part in (slice(0, 3), slice(3, 8)):
            layer(x[part]).backward(dy[part])
        close(getattr(layer, name).grad, whole)


def test_the_plan_is_made_again_only_when_locations_change():
    layer = make()
    plan = layer.plan
    layer(torch.randn(3, K))
    with torch.no_grad():
        layer.values.mul_(2)
    assert layer.plan is plan
    with torch.no_grad():
        layer.locations.copy_(1 - layer.locations)
    assert layer.plan is not plan
    assert torch.equal(torch.stack((layer.plan.rows, layer.plan.cols)), places(layer))
    with torch.no_grad():
        y = layer(x := torch.randn(3, K))
    close(y, formula(x, layer))


@pytest.mark.parametrize("fmt", (None, "nf4"))
def test_saves_and_copies_in_the_middle_of_a_schedule(fmt, tmp_path):
    """Training goes on as if it had not stopped."""
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(5)
    schedule, linear = LoCASchedule(100), nn.Linear(K, N)
    base = linear if fmt is None else lk.quantize(linear.weight.detach(), fmt)
    layer = LoCALinear(base, COUNT, schedule)
    x, target, optimizer = torch.randn(32, K), torch.randn(32, N), optimizer_of([layer])
    train([layer], x, target, schedule, 17, optimizer, [])
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    kept = copy.deepcopy((schedule.state_dict(), optimizer.state_dict()))
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    want: list = []
    train([layer], x, target, schedule, 20, optimizer, want)
    fresh_schedule = LoCASchedule(1)
    fresh = LoCALinear(base, COUNT, fresh_schedule)
    fresh(x)
    fresh.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    fresh_schedule.load_state_dict(kept[0])
    for other in (fresh, copied, pickled):
        again, found = optimizer_of([other]), []
        again.load_state_dict(copy.deepcopy(kept[1]))
        assert other.schedule is not schedule
        assert other.schedule.iteration == 17
        train([other], x, target, other.schedule, 20, again, found)
        assert found == want
        assert bitwise_equal(other.locations, layer.locations)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_locations_stay_float32(dtype):
    layer = make(trains="locations")
    layer(torch.randn(3, K)).sum().backward()
    before, slopes = layer.locations.detach().clone(), layer.locations.grad.clone()
    nn.Sequential(layer).to(dtype)
    assert layer.values.dtype == layer.base.weight.dtype == dtype
    assert bitwise_equal(layer.locations, before)
    assert bitwise_equal(layer.locations.grad, slopes)
    assert isinstance(layer.locations, nn.Parameter)
    x = torch.randn(4, K).to(dtype)
    close(layer(x), formula(x, layer), rtol=0.03)
    assert {t.device.type for t in layer.to("meta").parameters()} == {"meta"}


def test_only_what_is_asked_for_is_computed():
    layer, x = make(trains="locations"), torch.randn(3, K)
    layer.locations.requires_grad_(False)
    assert not layer(x).requires_grad
    leaf = x.requires_grad_()
    y = layer(leaf)
    close(torch.autograd.grad(y.sum(), leaf)[0], torch.autograd.grad(formula(leaf, layer).sum(), leaf)[0])
    with torch.no_grad():
        assert bitwise_equal(layer(x), y)


def test_located_refuses():
    x, values, plan = torch.randn(3, K), torch.randn(2), lk.SpectralPlan.random(2, (N, K))
    at = torch.rand(2, requires_grad=True)
    for call, error, match in (
        ({"rows": at[:1]}, ValueError, r"rows must be \[2\] as values, got \[1\]"),
        ({"cols": plan.cols}, TypeError, "cols must be float32"),
        ({"kind": "wht"}, ValueError, "kind must be 'dct'"),
        ({"x": x[:, 1:]}, ValueError, r"x must be \[..., 24\]"),
        ({"y": torch.zeros(3, K)}, ValueError, r"y must be \[3, 20\], got \[3, 24\]"),
        ({"y": torch.zeros(3, N).half()}, TypeError, "y must be torch.float32 or float32"),
    ):
        with pytest.raises(error, match=match):
            spectral_linear_located(**{"x": x, "values": values, "rows": at, "cols": at, "plan": plan, **call})


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: LoCALinear(nn.ReLU(), 3, LoCASchedule(1)), TypeError, "base must be a torch.nn.Linear or a Quant"),
        (lambda: LoCALinear(nn.Linear(4, 4), 0, LoCASchedule(1)), ValueError, "n must be an int >= 1, got 0"),
        (lambda: LoCALinear(nn.Linear(4, 4), 3, 100), TypeError, "schedule must be a LoCASchedule, got int"),
        (lambda: LoCASchedule(1.0), TypeError, "learn_location_iter must be an int, got float"),
        (lambda: LoCASchedule(-1), ValueError, "learn_location_iter must be at least 0, got -1"),
        (lambda: LoCASchedule(1, coefficient_steps=0), ValueError, "coefficient_steps must be at least 1, got 0"),
        (lambda: LoCASchedule(1, location_steps=-1), ValueError, "location_steps must be at least 0, got -1"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_repr():
    assert "in_features=24, out_features=20, n=12, kind=dct, scale=0.7" in repr(make())
    assert repr(LoCASchedule(9)).startswith("LoCASchedule(9, coefficient_steps=10, location_steps=20")


def test_compiled():
    """With a break where the plan is made; locations that move are seen."""
    torch._dynamo.reset()
    layer, x = make(), torch.randn(6, K, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    for trains, leaf in (("coefficients", layer.values), ("locations", layer.locations)):
        while layer.schedule.trains != trains:
            layer.schedule.step()
        for _ in range(2):
            results = [(y, *torch.autograd.grad(y.square().sum(), (x, leaf))) for y in (compiled(x), layer(x))]
            for g, w in zip(*results, strict=True):
                close(g, w)
            with torch.no_grad():
                layer.locations.copy_(torch.rand(2, COUNT))
