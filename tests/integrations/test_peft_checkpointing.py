"""Activation checkpointing, saved tensors and graphs used more than once: the mask is made again, never stored."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from nets import LLAMA_LAYERS, TOKENS, K, N, Net, close, config, llama, up_of  # noqa: E402
from peft import get_peft_model  # noqa: E402
from seeded import Pair  # noqa: E402

from lora_kernels.integrations.peft import FAST  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]

#: name -> (configuration, what is expected: FAST, or a word of the reason)
CONFIGURED = {
    "plain": ({}, FAST),
    "dropout": (dict(lora_dropout=0.4), FAST),
    "bias": (dict(lora_bias=True), FAST),
    "DoRA": (dict(use_dora=True), FAST),
    "DoRA with dropout": (dict(use_dora=True, lora_dropout=0.4), FAST),
}
M = 48


def training(**kwargs):
    base = Net()
    base.down = nn.Linear(N, K)
    model = get_peft_model(base, config(**kwargs)).train()
    for name, p in model.named_parameters():
        if "magnitude" in name or (name.endswith("bias") and "lora_B" in name):
            p.data.mul_(0.5).add_(torch.rand_like(p))
    return model


def gradients(model, run):
    """(output, dx, gradient of every parameter that has one) of ``run(x)``."""
    model.zero_grad()
    x = torch.linspace(-1, 1, M * K).view(4, -1, K).requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("configured", CONFIGURED)
class TestCheckpoint:
    def test_gradients_are_the_uncheckpointed_ones(self, calls, configured, reentrant):
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))

        def checkpointed(m):
            return gradients(m, lambda x: checkpoint(m, x, use_reentrant=reentrant))

        found = pair.same(calls, checkpointed, expected)
        torch.manual_seed(5)
        found = checkpointed(pair.model)
        assert (sum(calls.take()) == 4) or not reentrant
        torch.manual_seed(5)
        plain = gradients(pair.model, pair.model)
        assert all(map(torch.equal, found[:2], plain[:2]))
        assert found[2].keys() == plain[2].keys()
        assert all(torch.equal(found[2][n], g) for n, g in plain[2].items())

    def test_layer_by_layer_with_random_numbers_between(self, calls, configured, reentrant):
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))

        def run(m):
            up, down = up_of(m), m.base_model.model.down

            def chain(x):
                y = checkpoint(up, x, use_reentrant=reentrant)
                y = nn.functional.dropout(y, 0.2)
                return checkpoint(down, y, use_reentrant=reentrant)

            return gradients(m, chain)

        assert len(pair.same(calls, run, expected)[2]) >= 4

    def test_nested(self, calls, configured, reentrant):
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))

        def run(m):
            def inner(x):
                return checkpoint(m, x, use_reentrant=reentrant)

            return gradients(m, lambda x: checkpoint(inner, x, use_reentrant=reentrant))

        pair.same(calls, run, expected)


class TestModels:
    @pytest.mark.parametrize("reentrant", (True, False))
    def test_llama_with_dropout(self, calls, reentrant):
        """Through transformers' own switch, against the twin without checkpoints."""
        model = llama()
        for layer in model.modules():
            if hasattr(layer, "lora_dropout"):
                layer.lora_dropout.update({"default": nn.Dropout(0.2)})
        model.enable_input_require_grads()
        pair = Pair(model.train())
        pair.model.gradient_checkpointing_enable({"use_reentrant": reentrant})

        def run(m):
            m.zero_grad()
            loss = m(TOKENS, labels=TOKENS).loss
            loss.backward()
            return loss.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        assert len(pair.same(calls, run)[1]) == 2 * LLAMA_LAYERS

    def test_sequential(self, calls):
        model = training(lora_dropout=0.4)
        pair = Pair(model)

        def run(m):
            net = m.base_model.model
            return gradients(
                m, lambda x: checkpoint_sequential([net.up, nn.ReLU(), net.down], 2, x, use_reentrant=False)
            )

        pair.same(calls, run)

    def test_without_the_generators_state(self, calls):
        """preserve_rng_state=False takes the mask from whatever state there is, as torch's dropout would."""
        pair = Pair(training(lora_dropout=0.4))

        def run(m):
            return gradients(m, lambda x: checkpoint(m, x, use_reentrant=False, preserve_rng_state=False))

        found = pair.same(calls, run)
        torch.manual_seed(1)
        first = run(pair.model)
        torch.manual_seed(1)
        plain = gradients(pair.model, pair.model)
        assert torch.equal(first[0], plain[0])
        assert not torch.allclose(first[1], plain[1])
        assert len(found[2]) == 4


def saved(model, x):
    """The tensors that the graph of ``model(x)`` keeps, without parameters and x itself."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    kept = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return y, kept


class TestSavedTensors:
    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    @pytest.mark.parametrize("masters", (True, False))
    def test_only_x_and_what_is_small(self, calls, masters, dropout):
        """x itself, v [M, R] and the seed: no mask, no x̃, no fp32 copy of x, nothing [M, N]."""
        base = Net().bfloat16()
        model = get_peft_model(base, config(lora_dropout=dropout), autocast_adapter_dtype=masters).train()
        pair = Pair(model)
        x = torch.randn(M, K).bfloat16().requires_grad_()
        _, kept = saved(up_of(pair.model), x)
        assert calls.take() == (1, 0)
        r = up_of(model).r["default"]
        assert 0 < sum(t.numel() for t in kept) <= M * r + 1, [t.shape for t in kept]
        _, theirs = saved(up_of(pair.twin), x)
        if masters or dropout:
            assert 4 * sum(t.nbytes for t in kept) < sum(t.nbytes for t in theirs)

    def test_of_dora_without_dropout(self, calls):
        """Beside v the output, which is shared with who reads it, or one tensor of its size; and what is [N]."""
        kwargs, expected = CONFIGURED["DoRA"]
        pair = Pair(training(**kwargs))
        x = torch.randn(M, K, requires_grad=True)
        _, kept = saved(up_of(pair.model), x)
        assert calls.take() == ((1, 0) if expected == FAST else (0, 1))
        if expected == FAST:
            assert sum(t.numel() for t in kept) <= M * 4 + M * N + 4 * N

    @pytest.mark.parametrize("dropout", (0.0, 0.4))
    def test_frozen_a_does_not_keep_x(self, calls, dropout):
        pair = Pair(training(lora_dropout=dropout))
        up_of(pair.model).lora_A.default.weight.requires_grad_(False)
        x = torch.randn(M, K, requires_grad=True)
        stores = []
        with saved_tensors_hooks(lambda t: stores.append(t.untyped_storage().data_ptr()) or t, lambda t: t):
            up_of(pair.model)(x)
        assert calls.take() == (1, 0)
        assert x.untyped_storage().data_ptr() not in stores

    @pytest.mark.parametrize("configured", CONFIGURED)
    def test_offloaded(self, calls, configured):
        """The saved tensors go through torch's hooks and come back as copies."""
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))

        def run(m):
            def packed(x):
                with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone()):
                    return m(x)

            return gradients(m, packed)

        pair.same(calls, run, expected)

        def on_cpu(m):
            with save_on_cpu():
                return gradients(m, m)

        pair.same(calls, on_cpu, expected)

    def test_nothing_is_kept_without_gradients(self, calls):
        pair = Pair(training(lora_dropout=0.4))
        with torch.no_grad():
            assert saved(pair.model, torch.randn(M, K))[1] == []
        assert calls.take() == (2, 0)

    @pytest.mark.parametrize("configured", CONFIGURED)
    def test_nothing_is_written_into(self, calls, configured):
        """Not x, not a parameter, not the gradient that comes in."""
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))

        def run(m):
            x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, K)
            held = [x, dy, *m.parameters()]
            before = [(t.detach().clone(), t._version) for t in held]
            m(x).backward(dy)
            for t, (value, version) in zip(held, before, strict=True):
                assert t._version == version
                assert torch.equal(t, value)
            return x.grad

        pair.same(calls, run, expected)

    @pytest.mark.parametrize("what", ("x", "lora_A", "lora_B"))
    def test_changed_before_the_backward_pass_is_noticed(self, calls, what):
        """An error, no wrong gradient."""
        model = Pair(training(lora_dropout=0.4)).model
        x = torch.randn(M, K)
        y = up_of(model)(x)
        assert calls.take() == (1, 0)
        with torch.no_grad():
            (x if what == "x" else getattr(up_of(model), what).default.weight).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class TestUsedMoreThanOnce:
    @pytest.mark.parametrize("configured", CONFIGURED)
    def test_retain_graph_twice(self, calls, configured):
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))

        def run(m):
            x = torch.randn(M, K)
            loss, found = m(x).square().sum(), []
            for retain in (True, True, False):
                m.zero_grad()
                torch.rand(3)  # what is drawn between changes no mask
                loss.backward(retain_graph=retain)
                found.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
            return found

        first, *others = pair.same(calls, run, expected)
        assert all(torch.equal(*two) for other in others for two in zip(first, other, strict=True))

    @pytest.mark.parametrize("configured", CONFIGURED)
    def test_a_layer_used_twice(self, calls, configured):
        """Each use has a mask of its own; the gradients add up."""
        kwargs, expected = CONFIGURED[configured]
        pair = Pair(training(**kwargs))

        def run(m):
            net = m.base_model.model
            return gradients(m, lambda x: net.down(net.up(x) * net.up(2 * net.down(net.up(x)))))

        pair.same(calls, run, expected, rtol=2e-4, atol=2e-4)

    def test_backward_passes_in_another_order(self, calls):
        pair = Pair(training(lora_dropout=0.4))

        def run(m):
            m.zero_grad()
            losses = [m(torch.randn(5, K)).square().sum() for _ in range(3)]
            for loss in (losses[1], losses[2], losses[0]):
                loss.backward()
            return [p.grad for p in m.parameters() if p.grad is not None]

        pair.same(calls, run, rtol=1e-4, atol=1e-4)

    def test_gradients_of_some_inputs(self, calls):
        """torch.autograd.grad, which asks for x alone, then for a factor alone."""
        pair = Pair(training(lora_dropout=0.4))

        def run(m):
            x = torch.randn(5, K, requires_grad=True)
            loss = m(x).square().sum()
            one = torch.autograd.grad(loss, [x], retain_graph=True)
            two = torch.autograd.grad(loss, [up_of(m).lora_B.default.weight], retain_graph=True)
            return one, two, torch.autograd.grad(loss, [up_of(m).lora_A.default.weight])

        pair.same(calls, run)

    def test_second_derivatives_are_refused(self):
        """PEFT has them; the kernels say that they have not, where a wrong one would be worse."""
        pair = Pair(training())
        x = torch.randn(5, K, requires_grad=True)
        (dx,) = torch.autograd.grad(pair.model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()

    def test_from_several_threads(self, calls):
        """Backward passes at once; autograd runs them in the callers' threads on the CPU."""
        from concurrent.futures import ThreadPoolExecutor

        pair = Pair(training(lora_dropout=0.4))
        x = torch.randn(5, K, requires_grad=True)
        torch.manual_seed(0)
        losses = [pair.model(x).square().sum() for _ in range(4)]
        weights = [p for p in pair.model.parameters() if p.requires_grad]
        wanted = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda loss: torch.autograd.grad(loss, weights), losses))
        close(found, wanted, rtol=0, atol=0)
