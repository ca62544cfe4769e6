"""A patched PEFT model on a GPU against PEFT's own forward there."""

import contextlib
import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from nets import BATCHES, LLAMA_LAYERS, TOKENS, K, adapters, both, close, llama, net, trained

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DEVICE = "cuda"
SEVERAL = ["default", "low", "pattern"]
WAYS = pytest.mark.parametrize("names", (None, *BATCHES[:2]), ids=("one", "mixed", "mixed-some-layers-lack"))


def on_gpu(model):
    """(an unpatched copy, the model patched, its handle), on the GPU."""
    return both(model.to(DEVICE))


def alike(actual, expected):
    close(actual, expected, rtol=1e-4, atol=1e-4)


def by_name(names):
    return {} if names is None else {"adapter_names": names}


def activate(names, *models):
    for model in models:
        model.base_model.set_adapter(names)


def all_lora_requires_grad(*models):
    for model in models:
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)


class TestForward:
    @pytest.mark.parametrize("shape", ((4, K), (3, 50, K), (700, K)))
    @pytest.mark.parametrize("active", (["default"], ["low"], SEVERAL))
    def test_active_adapters(self, calls, active, shape):
        oracle, model, handle = on_gpu(adapters())
        activate(active, oracle, model)
        x = torch.randn(shape, device=DEVICE)
        with torch.no_grad():
            alike(model(x), oracle(x))
        assert calls.take() == (2, 0)
        report = handle.report()
        assert (report.fast, report.total) == (2, 2)

    @pytest.mark.parametrize("names", BATCHES)
    @pytest.mark.parametrize("shape", ((1, K), (1, 5, K), (40, 3, K)))
    def test_mixed_batch(self, calls, names, shape):
        oracle, model, _ = on_gpu(adapters())
        x = torch.randn(4 * shape[0], *shape[1:], device=DEVICE)
        names = [name for name in names for _ in range(shape[0])]
        with torch.no_grad():
            alike(model(x, adapter_names=names), oracle(x, adapter_names=names))
        down_has_none = not {"default", "low", "pattern"} & set(names)
        assert calls.take() == ((1, 1) if down_has_none else (2, 0))

    @pytest.mark.parametrize("masters", (True, False))
    @WAYS
    def test_bf16_base(self, calls, names, masters):
        model = adapters(net(torch.bfloat16))
        oracle, model, _ = on_gpu(model if masters else model.bfloat16())
        layer, x = "base_model.model.up", torch.randn(256, K, device=DEVICE, dtype=torch.bfloat16)
        options = by_name(names and names * 64)
        with torch.no_grad():
            truth = copy.deepcopy(oracle).double().get_submodule(layer)(x.double(), **options)
            expected = oracle.get_submodule(layer)(x, **options)
            actual = model.get_submodule(layer)(x, **options)
        assert actual.dtype == expected.dtype
        assert (actual - truth).norm() <= 1.05 * (expected - truth).norm()
        assert calls.take() == (1, 0)

    def test_generates_the_same_tokens(self, calls):
        oracle, model, handle = on_gpu(llama(bias=True))
        tokens, names = TOKENS.to(DEVICE), ["default", "two", "__base__", "one"]
        options = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(tokens), adapter_names=names)
        expected = oracle.generate(tokens, **options)
        assert torch.equal(model.generate(tokens, **options), expected)
        assert calls.take() == (8 * LLAMA_LAYERS, 0)
        assert handle.report().fast == LLAMA_LAYERS


class TestTraining:
    @pytest.mark.parametrize("active", (["default"], SEVERAL))
    def test_active_adapters(self, calls, active):
        oracle, model, _ = on_gpu(adapters())
        activate(active, oracle, model)
        x = torch.randn(3, 20, K, device=DEVICE)
        actual = trained(model, x)
        assert len(actual[2]) == 4 * len(active)
        alike(actual, trained(oracle, x))
        assert calls.take() == (2, 0)

    @pytest.mark.parametrize("names", BATCHES)
    def test_mixed_batch(self, calls, names):
        oracle, model, _ = on_gpu(adapters())
        all_lora_requires_grad(oracle, model)
        x = torch.randn(4, 20, K, device=DEVICE)
        expected, actual = trained(oracle, x, adapter_names=names), trained(model, x, adapter_names=names)
        alike(actual[:2], expected[:2])
        assert expected[2].keys() <= actual[2].keys()
        for name, grad in actual[2].items():  # adapters without a row: zeros where PEFT has none
            alike(grad, expected[2].get(name, torch.zeros_like(grad)))
        assert calls.fast >= 1

    @WAYS
    def test_bf16_base_with_masters(self, calls, names):
        oracle, model, _ = on_gpu(adapters(net(torch.bfloat16)))
        oracle, model = (m.get_submodule("base_model.model.up") for m in (oracle, model))
        x, options = torch.randn(256, K, device=DEVICE, dtype=torch.bfloat16), by_name(names and names * 64)
        truth = trained(copy.deepcopy(oracle).double(), x.double(), **options)
        expected, actual = trained(oracle, x, **options), trained(model, x, **options)
        assert actual[2].keys() == expected[2].keys()
        for name, true in {"x": truth[1], **truth[2]}.items():
            ours, theirs = (found[1] if name == "x" else found[2][name] for found in (actual, expected))
            assert ours.dtype == theirs.dtype
            assert (ours - true).norm() <= 1.05 * (theirs - true).norm() + 1e-5 * true.norm(), name
        assert calls.take() == (1, 0)


class TestWhere:
    def test_moved_after_it_was_patched(self, calls):
        oracle, model, handle = both(adapters())
        x = torch.randn(4, K)
        for device in ("cpu", DEVICE, "cpu", DEVICE):
            for m in (oracle, model):
                m.to(device)
            for names in (None, BATCHES[0]):
                with torch.no_grad():
                    alike(model(x.to(device), **by_name(names)), oracle(x.to(device), **by_name(names)))
            taken = calls.take()
        assert taken == (4, 0)
        assert handle.report().fast == 2

    def test_unpatched(self, calls):
        oracle, model, handle = on_gpu(adapters())
        x = torch.randn(4, K, device=DEVICE)
        with torch.no_grad():
            model(x)
            handle.unpatch()
            calls.take()
            assert [type(m) for m in model.modules()] == [type(m) for m in oracle.modules()]
            assert torch.equal(model(x), oracle(x))
        assert calls.take() == (0, 0)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    @WAYS
    def test_another_gpu_than_the_current_one(self, calls, names):
        oracle, model, _ = both(adapters().to("cuda:1"))
        all_lora_requires_grad(oracle, model)
        x = torch.randn(4, K, device="cuda:1")
        with torch.no_grad():
            alike(model(x, **by_name(names)), oracle(x, **by_name(names)))
        alike(trained(model, x, **by_name(names))[:2], trained(oracle, x, **by_name(names))[:2])
        assert calls.take() == (4, 0)


class TestGraphs:
    @WAYS
    def test_a_captured_graph_takes_other_inputs(self, calls, names):
        oracle, model, _ = on_gpu(adapters())
        x = torch.zeros(4, 3, K, device=DEVICE)
        with torch.no_grad():
            graph, y = captured(lambda: model(x, **by_name(names)))
            calls.take()
            for _ in range(3):
                x.normal_()
                graph.replay()
                alike(y, model(x, **by_name(names)))
                alike(y, oracle(x, **by_name(names)))
        assert calls.take() == (6, 0)

    @pytest.mark.parametrize("active", (["default"], SEVERAL))
    @WAYS
    def test_a_warm_forward_does_not_wait_for_the_gpu(self, calls, active, names):
        _, model, _ = on_gpu(adapters())
        activate(active, model)
        x = torch.randn(4, 3, K, device=DEVICE)
        with torch.no_grad():
            model(x, **by_name(names))
            with no_waiting():
                model(x, **by_name(names))
        assert calls.take() == (4, 0)


def captured(step):
    """A graph of ``step()``, and what its replays write their result into."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    return graph, y


@contextlib.contextmanager
def no_waiting():
    """What waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
