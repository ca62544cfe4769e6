"""``torch.compile`` of patched models, with no graph break or recompilation; the eager unpatched twin is the oracle."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from nets import TOKENS, K, N, Net, adapters, close, config, llama, trained, up_of  # noqa: E402
from peft import get_peft_model  # noqa: E402
from seeded import Pair, seed_dropout  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from lora_kernels.integrations.peft import FAST  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("unforced")]

#: name -> (configuration, what is expected: FAST, or a word of the reason)
CONFIGURED = {
    "plain": ({}, FAST),
    "dropout": (dict(lora_dropout=0.4), FAST),
    "bias": (dict(lora_bias=True), FAST),
    "DoRA": (dict(use_dora=True), FAST),
}
AUTOCAST = False  # whether the graph has our ops
CONV1D = FAST


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def training(**kwargs):
    base = Net()
    base.down = nn.Linear(N, K)
    return get_peft_model(base, config(**kwargs)).train()


class Graphs:
    """A backend that runs the graphs as they are, through AOTAutograd, and keeps them."""

    def __init__(self):
        self.code = []
        self.run = aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)

    def keep(self, graph, inputs):
        self.code.append(graph.code)
        return graph.forward

    def __call__(self, graph, inputs):
        return self.run(graph, inputs)

    def compile(self, module, **kwargs):
        return torch.compile(module, backend=self, fullgraph=True, **kwargs)

    def take(self):
        """(how many graphs since the last time, whether each that is a LoRA layer's has our ops)."""
        taken, self.code = self.code, []
        return len(taken), "lora_kernels" in "".join(taken)


def check(pair, expected, graphs, compiled, run):
    """``run(net, model)`` gives the same of the twin, eager, and the compiled net, from the same seed.

    Returns:
        How many graphs were made.
    """
    layers = pair.handle.report().layers
    fast = {name for name, reason in layers.items() if reason == FAST}
    assert fast == (set(layers) if expected == FAST else set()), layers
    assert expected == FAST or all(expected in reason for reason in layers.values()), layers
    seed_dropout(pair.twin, fast)
    state = torch.get_rng_state()
    wanted = run(pair.twin.base_model.model, pair.twin)
    torch.set_rng_state(state)
    found = run(compiled, pair.model)
    close(found, wanted)
    count, ours = graphs.take()
    assert ours == (expected == FAST) or not count
    return count


@pytest.mark.parametrize("configured", CONFIGURED)
class TestFullGraph:
    def test_training(self, configured):
        """One graph forward and one backward, for any number of rows after the second."""
        kwargs, expected = CONFIGURED[configured]
        pair, graphs = Pair(training(**kwargs)), Graphs()
        net = graphs.compile(pair.model.base_model.model)

        def run(net, model, rows):
            leaf = torch.linspace(-1, 1, rows * K).view(rows, K).requires_grad_()
            weights = [p for p in model.parameters() if p.requires_grad]
            y = net(leaf)
            grads = torch.autograd.grad(y.square().sum(), [leaf, *weights])
            return y.detach(), grads

        made = [
            check(pair, expected, graphs, net, lambda *args, rows=rows: run(*args, rows)) for rows in (4, 6, 7, 9, 33)
        ]
        assert made[0] == 2
        assert sum(made) <= 4
        assert made[2:] == [0, 0, 0]

    def test_inference(self, configured):
        kwargs, expected = CONFIGURED[configured]
        pair, graphs = Pair(training(**kwargs).eval()), Graphs()
        net = graphs.compile(pair.model.base_model.model)
        made = []
        for rows in (4, 6, 7, 9, 33):
            x = torch.randn(rows, K)
            with torch.no_grad():
                made.append(check(pair, expected, graphs, net, lambda net, model, x=x: net(x)))
        assert made[0] == 1
        assert sum(made) <= 2

    def test_scaling_changed(self, configured):
        """Right after each change, and no new graph for every value."""
        kwargs, expected = CONFIGURED[configured]
        pair, graphs = Pair(training(**kwargs).eval()), Graphs()
        net = graphs.compile(pair.model.base_model.model)
        x, made = torch.randn(5, K), []
        for scale in (0.5, 2.0, 3.5, 0.125, 7.0):
            pair.do(lambda m, scale=scale: up_of(m).set_scale("default", scale))
            with torch.no_grad():
                made.append(check(pair, expected, graphs, net, lambda net, model: net(x)))
        assert made[2:] == [0, 0, 0]


class TestSteps:
    @pytest.mark.parametrize("dropout", (0.0, 0.3))
    def test_losses_are_the_twins(self, dropout):
        pair, graphs = Pair(training(lora_dropout=dropout)), Graphs()
        net = graphs.compile(pair.model.base_model.model)

        def run(net, model):
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
            losses = []
            for _ in range(3):
                x = torch.randn(6, K)
                loss = (net(x) - x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return losses

        assert check(pair, FAST, graphs, net, run) == 2

    def test_masks_differ_from_call_to_call(self):
        pair, graphs = Pair(training(lora_dropout=0.4)), Graphs()
        layer = graphs.compile(up_of(pair.model))
        x = torch.randn(16, K)
        with torch.no_grad():
            a, b = layer(x), layer(x)
            torch.manual_seed(0)
            c = layer(x)
            torch.manual_seed(0)
            assert torch.equal(layer(x), c)
        assert not torch.allclose(a, b)
        assert graphs.take() == (1, True)

    def test_checkpointed(self):
        """The mask is the same when the graph is recomputed."""
        from torch.utils.checkpoint import checkpoint

        pair, graphs = Pair(training(lora_dropout=0.4)), Graphs()
        net = pair.model.base_model.model
        compiled = graphs.compile(lambda x: checkpoint(net, x, use_reentrant=False))

        def run(net, model):
            model.zero_grad()
            net(torch.linspace(-1, 1, 5 * K).view(5, K)).square().sum().backward()
            return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        check(pair, FAST, graphs, compiled, run)


class TestModels:
    def test_several_active_adapters(self):
        model = adapters(training())
        model.base_model.set_adapter(["default", "pattern"])
        pair, graphs = Pair(model.train()), Graphs()
        net = graphs.compile(pair.model.base_model.model)

        def run(net, model):
            model.zero_grad()
            y = net(torch.linspace(-1, 1, 5 * K).view(5, K))
            y.square().sum().backward()
            return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        assert check(pair, FAST, graphs, net, run) == 2

    def test_switching_adapters_is_seen(self):
        pair, graphs = Pair(adapters(training()).eval()), Graphs()
        net = graphs.compile(pair.model.base_model.model)
        x = torch.randn(5, K)
        for active in ("low", "default", "pattern"):
            pair.do(lambda m, active=active: m.base_model.set_adapter(active))
            with torch.no_grad():
                check(pair, FAST, graphs, net, lambda net, model: net(x))

    def test_disabled_is_seen(self):
        pair, graphs = Pair(training().eval()), Graphs()
        net = graphs.compile(pair.model.base_model.model)
        x = torch.randn(5, K)
        with torch.no_grad():
            on = net(x)
            with pair.twin.disable_adapter(), pair.model.disable_adapter():
                close(net(x), pair.twin(x))
                assert not torch.allclose(net(x), on)
            close(net(x), pair.twin(x))

    def test_conv1d(self):
        base = Net()
        base.up, base.down = Conv1D(N, K), Conv1D(K, N)
        model = get_peft_model(base, config(fan_in_fan_out=True, lora_dropout=0.4)).train()
        pair, graphs = Pair(model), Graphs()
        net = graphs.compile(pair.model.base_model.model)

        def run(net, model):
            model.zero_grad()
            net(torch.linspace(-1, 1, 5 * K).view(5, K)).square().sum().backward()
            return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        check(pair, CONV1D, graphs, net, run)

    def test_autocast(self):
        pair, graphs = Pair(training()), Graphs()
        net = graphs.compile(pair.model.base_model.model)
        x = torch.randn(5, K)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
            eager = pair.model.base_model.model(x)
        assert y.dtype == torch.bfloat16
        close(y, eager, rtol=0.02, atol=0.02)
        assert graphs.take()[1] == AUTOCAST

    def test_llama(self):
        """A whole model in one graph, by the default backend's decompositions of nothing: ``aot_eager``."""
        pair = Pair(llama().train())
        compiled = torch.compile(pair.model.base_model.model, backend="aot_eager", fullgraph=True)
        pair.twin.zero_grad()
        wanted = pair.twin(TOKENS, labels=TOKENS, use_cache=False).loss
        wanted.backward()
        found = compiled(TOKENS, labels=TOKENS, use_cache=False).loss
        found.backward()
        close(found, wanted)
        expected = {n: p.grad for n, p in pair.twin.named_parameters() if p.grad is not None}
        close({n: p.grad for n, p in pair.model.named_parameters() if p.grad is not None}, expected)
        assert len(expected) == 28

    def test_eager_backend_and_the_eager_model_agree(self):
        """The compiled layer and the layer itself, from the same seed."""
        pair = Pair(training(lora_dropout=0.4))
        layer, x = up_of(pair.model), torch.randn(5, K)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.manual_seed(2)
        wanted = trained(layer, x)
        torch.manual_seed(2)
        leaf = x.clone().requires_grad_()
        y = compiled(leaf)
        close(y, wanted[0])
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        close(leaf.grad, wanted[1])
