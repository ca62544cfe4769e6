"""The wrapper's methods on vLLM's layers, against the formula in float64 and vLLM's own; traced as vLLM traces them."""

import os

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.lora.layers import (
    LogitsProcessorWithLoRA,
    LoRAMapping,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.punica_wrapper import punica_gpu
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from lora_kernels.integrations._vllm_wrapper import LoRAKernelsCPU, LoRAKernelsGPU, stack_of

SLOTS, MAX_RANK, K, VOCABULARY = 4, 16, 48, 72
RANKS = (8, 3, 16)  # of the adapters in the slots; the last slot is empty, which vLLM's own CPU code needs
TOKENS = (1, 0, 0, 3, 2, 2, 2, 1, 0, 3, 0)  # adapters, from 1 on, of the rows of a step; 0 = none
SAMPLES = (1, 3, 0, 2)  # of the rows of its logits


@pytest.fixture(scope="module", autouse=True)
def engine_of_one():
    """What vLLM's layers ask for when they are made."""
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    before = dict(os.environ)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1)
        yield
    cleanup_dist_env_and_memory()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def lora_config():
    return LoRAConfig(max_lora_rank=MAX_RANK, max_loras=SLOTS, lora_dtype=torch.float32)


@pytest.fixture
def metadata_of_gpus(monkeypatch):
    """vLLM imports it, which is plain torch, where there is a GPU only."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta

    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", LoRAKernelMeta, raising=False)


@pytest.fixture(params=(LoRAKernelsCPU, LoRAKernelsGPU), ids=("cpu", "gpu"))
def ours(request, lora_config, metadata_of_gpus):
    """Both classes on tensors of the CPU's."""
    return request.param(32, 8, "cpu", lora_config=lora_config)


@pytest.fixture
def theirs(lora_config):
    return PunicaWrapperCPU(32, 8, "cpu", lora_config=lora_config)


@pytest.fixture
def both(ours, theirs):
    """Both wrappers told of a step."""

    def tell(tokens=TOKENS, samples=SAMPLES):
        for wrapper in (ours, theirs):
            step(wrapper, tokens, samples)
        return ours, theirs

    return tell


def step(wrapper, tokens, samples=()):
    mapping = LoRAMapping(tokens, samples, is_prefill=True)
    wrapper.update_metadata(mapping, [1, 2, 3, None], SLOTS + 1, VOCABULARY)


def qkv():
    from vllm.model_executor.layers.linear import QKVParallelLinear

    base = QKVParallelLinear(K, 16, 4, 2, bias=False, params_dtype=torch.float32)
    return MergedQKVParallelLinearWithLoRA(base), (64, 32, 32)


def gate_up():
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    base = MergedColumnParallelLinear(K, [40, 40], bias=False, params_dtype=torch.float32)
    return MergedColumnParallelLinearWithLoRA(base), (40, 40)


def down():
    from vllm.model_executor.layers.linear import RowParallelLinear

    base = RowParallelLinear(K, 56, bias=False, params_dtype=torch.float32)
    return RowParallelLinearWithLoRA(base), (56,)


@pytest.fixture(params=(qkv, gate_up, down), ids=lambda make: make.__name__)
def linear(request, ours, lora_config):
    """A layer of 3, 2 or 1 slices whose slots hold adapters of RANKS; its output sizes."""
    return filled(request.param, ours, lora_config)


def filled(make, wrapper, lora_config):
    layer, sizes = make()
    layer.create_lora_weights(SLOTS, lora_config)
    layer.set_mapping(wrapper)
    wrapper.adopt(layer)
    for slot, rank in enumerate(RANKS):
        load(layer, sizes, slot, rank)
    return layer, sizes


def load(layer, sizes, slot, rank):
    a = [torch.randn(rank, K) for _ in sizes]
    b = [torch.randn(size, rank) for size in sizes]
    layer.set_lora(slot, *((a, b) if len(sizes) > 1 else (a[0], b[0])))


def poison(layer):
    """NaN past the live ranks."""
    for stack in (stack_of(layer.lora_a_stacked), stack_of(layer.lora_b_stacked)):
        for factor in stack.factors:
            for slot, rank in enumerate((*RANKS, 0)):
                factor[slot].narrow(stack.rank_dim, rank, MAX_RANK - rank).fill_(torch.nan)


def slots(ids):
    return [id_ - 1 for id_ in ids]


def formula(y, x, a_stacked, b_stacked, ids, scale=1.0):
    """y + scale · (x Aᵀ) Bᵀ, slice by slice, in float64; rows past the ids have no adapter."""
    y, x = y.double(), x.double()
    for row, slot in enumerate(slots(ids)):
        if slot >= 0:
            parts = [
                b[slot, 0].double() @ (a[slot, 0].double() @ x[row]) for a, b in zip(a_stacked, b_stacked, strict=True)
            ]
            y[row] += scale * torch.cat(parts)
    return y


def test_the_highest_rank_in_use_decides_how_far_factors_lie_apart(ours, lora_config):
    layer, sizes = qkv()
    layer.create_lora_weights(SLOTS, lora_config)
    layer.set_mapping(ours)
    ours.adopt(layer)
    step(ours, TOKENS)
    stacks = layer.lora_a_stacked, layer.lora_b_stacked
    for slot, rank, width in ((0, 3, 4), (1, 5, 8), (2, 16, 16), (2, 2, 8), (1, 1, 4), (0, 8, 8)):
        load(layer, sizes, slot, rank)
        assert {b.stride(1) for b in stack_of(stacks[1]).fitted} == {width}
        x, y = torch.randn(len(TOKENS), K), torch.randn(len(TOKENS), sum(sizes))
        want = formula(y, x, *stacks, TOKENS)
        ours.add_lora_linear(y, x, *stacks, 1.0, sizes)
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=2e-5)


class TestLinear:
    @pytest.mark.parametrize("scale", (1.0, 0.5))
    def test_is_the_formula_and_vllms(self, both, linear, scale):
        layer, sizes = linear
        x, y = torch.randn(len(TOKENS), K), torch.randn(len(TOKENS), sum(sizes))
        exact = formula(y, x, layer.lora_a_stacked, layer.lora_b_stacked, TOKENS, scale)
        for wrapper in both():
            mine = y.clone()
            wrapper.add_lora_linear(mine, x, layer.lora_a_stacked, layer.lora_b_stacked, scale, sizes)
            close(mine, exact)

    @pytest.mark.parametrize("shape", ((len(TOKENS), K), (1, len(TOKENS), K)), ids=("rows", "batch"))
    def test_a_layers_forward(self, both, linear, shape):
        layer, _ = linear
        weight = layer.base_layer.weight.data.normal_().clone()
        layer.base_layer.quant_method.process_weights_after_loading(layer.base_layer)
        x = torch.randn(len(TOKENS), K)
        exact = formula(x @ weight.T, x, layer.lora_a_stacked, layer.lora_b_stacked, TOKENS)
        _, theirs = both()
        close(layer(x.view(shape))[0], exact.view(*shape[:-1], -1))
        vars(layer).pop("apply", None)  # ours
        layer.set_mapping(theirs)
        close(layer(x.view(shape))[0], exact.view(*shape[:-1], -1))

    def test_strided(self, both, linear):
        layer, sizes = linear
        ours, _ = both()
        x, wide = torch.randn(K, len(TOKENS)).T, torch.randn(2 * len(TOKENS), sum(sizes) + 9)
        y, kept = wide[::2, 4:-5], wide.clone()
        exact = formula(y, x, layer.lora_a_stacked, layer.lora_b_stacked, TOKENS)
        ours.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, sizes)
        close(y, exact)
        y.copy_(kept[::2, 4:-5])
        assert torch.equal(wide, kept)

    def test_three_dimensions(self, both, linear):
        layer, sizes = linear
        ours, _ = both()
        x, y = torch.randn(1, len(TOKENS), K), torch.randn(1, len(TOKENS), sum(sizes))
        exact = formula(y[0], x[0], layer.lora_a_stacked, layer.lora_b_stacked, TOKENS)
        ours.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, sizes)
        close(y[0], exact)

    def test_rows_past_the_steps_have_no_adapter(self, both, linear):
        """Padding, which a GPU's captured graphs add."""
        layer, sizes = linear
        ours, _ = both()
        step(ours, TOKENS[:6])
        x, y = torch.randn(16, K), torch.randn(16, sum(sizes))
        exact = formula(y, x, layer.lora_a_stacked, layer.lora_b_stacked, TOKENS[:6])
        rest = y[6:].clone()
        ours.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, sizes)
        close(y, exact)
        assert torch.equal(y[6:], rest)

    def test_an_emptied_slot_adds_nothing(self, both, linear):
        layer, sizes = linear
        ours, _ = both(tokens=(1, 2, 3))
        layer.reset_lora(1)
        x, y = torch.randn(3, K), torch.randn(3, sum(sizes))
        before = y.clone()
        ours.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, sizes)
        assert torch.equal(y[1], before[1])
        assert not torch.equal(y[0], before[0])
        assert not torch.equal(y[2], before[2])
        assert stack_of(layer.lora_a_stacked).ranks.tolist() == [[8, 0, 16, 0]] * len(sizes)

    def test_half_precision_rounds_once(self, lora_config):
        lora_config.lora_dtype = torch.bfloat16
        wrapper = LoRAKernelsCPU(32, 8, "cpu", lora_config=lora_config)
        step(wrapper, TOKENS)

        def make():
            layer, sizes = qkv()
            layer.base_layer.params_dtype = torch.bfloat16
            return layer, sizes

        layer, sizes = filled(make, wrapper, lora_config)
        x = torch.randn(len(TOKENS), K).bfloat16()
        y = torch.randn(len(TOKENS), sum(sizes)).bfloat16()
        exact = formula(y, x, layer.lora_a_stacked, layer.lora_b_stacked, TOKENS)
        wrapper.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, sizes)
        assert not wrapper.mixed
        torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2e-4)


class TestSharded:
    """The halves that layers with sharded ranks ask for, each worker for its own."""

    def test_shrink(self, both, linear):
        layer, sizes = linear
        x = torch.randn(len(TOKENS), K)
        exact = torch.zeros(len(sizes), len(TOKENS), MAX_RANK, dtype=torch.float64)
        for row, slot in enumerate(slots(TOKENS)):
            for s, a in enumerate(layer.lora_a_stacked):
                exact[s, row] = 0.5 * a[slot, 0].double() @ x[row].double() if slot >= 0 else 0
        for wrapper in both():
            v = torch.zeros(len(sizes), len(TOKENS), MAX_RANK)
            wrapper.add_shrink(v, x, layer.lora_a_stacked, 0.5)
            close(v, exact)

    @pytest.mark.parametrize("offset", (0, 24))
    def test_expand(self, both, linear, offset):
        layer, sizes = linear
        v, y = torch.randn(len(sizes), len(TOKENS), MAX_RANK), torch.randn(len(TOKENS), offset + sum(sizes) + 8)
        exact = y.double()
        for row, slot in enumerate(slots(TOKENS)):
            parts = [b[slot, 0].double() @ v[s, row].double() for s, b in enumerate(layer.lora_b_stacked)]
            if slot >= 0:
                exact[row, offset : offset + sum(sizes)] += torch.cat(parts)
        for wrapper in both():
            mine = y.clone()
            wrapper.add_expand(mine, v, layer.lora_b_stacked, sizes, offset_start=offset, add_input=True)
            close(mine, exact)

    def test_nothing_past_the_live_ranks_is_read(self, both, linear):
        layer, sizes = linear
        ours, _ = both()
        x, y = torch.randn(len(TOKENS), K), torch.randn(len(TOKENS), sum(sizes))
        exact = formula(y, x, layer.lora_a_stacked, layer.lora_b_stacked, TOKENS)
        poison(layer)
        v = torch.zeros(len(sizes), len(TOKENS), MAX_RANK)
        ours.add_shrink(v, x, layer.lora_a_stacked, 1.0)
        ours.add_expand(y, v, layer.lora_b_stacked, sizes)
        close(y, exact)


class TestEnds:
    def test_embedding(self, both, ours, lora_config):
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        layer = VocabParallelEmbeddingWithLoRA(VocabParallelEmbedding(VOCABULARY, 40, params_dtype=torch.float32))
        layer.base_layer.weight.data.normal_()
        layer.create_lora_weights(SLOTS, lora_config)
        ours.adopt(layer)
        factors = [(torch.randn(rank, VOCABULARY), torch.randn(40, rank)) for rank in RANKS]
        for slot, (a, b) in enumerate(factors):
            layer.set_lora(slot, a, b)
        ids = torch.randint(VOCABULARY, (len(TOKENS),))
        exact = layer.base_layer.weight[ids].double()
        for row, slot in enumerate(slots(TOKENS)):
            if slot >= 0:
                a, b = factors[slot]
                exact[row] += b.double() @ a[:, ids[row]].double()
        for wrapper in both():
            layer.set_mapping(wrapper)
            close(layer(ids), exact)
        assert stack_of(layer.lora_b_stacked).ranks.tolist() == [[*RANKS, 0]]

    def test_logits(self, both, ours, lora_config):
        """Of the rows that are sampled, not the tokens'; the model's are padded, the adapters' are not."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        layer = LogitsProcessorWithLoRA(LogitsProcessor(VOCABULARY), K, torch.float32, torch.device("cpu"), None)
        layer.create_lora_weights(SLOTS, lora_config)
        ours.adopt(layer)
        for slot, rank in enumerate(RANKS):
            layer.set_lora(slot, torch.randn(rank, K), torch.randn(VOCABULARY, rank))
        x, y = torch.randn(len(SAMPLES), K), torch.randn(len(SAMPLES), VOCABULARY + 56)
        exact = y.double()
        exact[:, :VOCABULARY] = formula(y[:, :VOCABULARY], x, [layer.lora_a_stacked], [layer.lora_b_stacked], SAMPLES)
        for wrapper in both():
            mine = y.clone()
            wrapper.add_lora_logits(mine, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0)
            close(mine, exact)

    def test_classification_heads(self, both):
        labels = 5
        weight, bias = torch.randn(SLOTS, 1, labels, K), torch.randn(SLOTS, labels)
        enabled = torch.tensor([True, False, True, False])
        x, y = torch.randn(len(SAMPLES), K), torch.randn(len(SAMPLES), labels)
        exact = y.double()
        for row, slot in enumerate(slots(SAMPLES)):
            if slot >= 0 and enabled[slot]:
                exact[row] = weight[slot, 0].double() @ x[row].double() + bias[slot].double()
        assert sum(not torch.equal(a, b) for a, b in zip(exact, y.double(), strict=True)) == 2
        for wrapper in both():
            mine = y.clone()
            wrapper.apply_lora_full_linear(mine, x, weight, bias, enabled)
            close(mine, exact)


class TestTraced:
    """In one graph, as vLLM has it, which stays right for other numbers of rows, other adapters and none."""

    STEPS = (TOKENS, TOKENS[:4], (0,) * 9, (3,) * 20, (0, 0), tuple(reversed(TOKENS)))

    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()

    def run(self, function, make, exact, wrapper, first=STEPS[0]):
        """The function on what ``make`` gives for each step; it changes its first argument."""
        counter = CompileCounter()
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
        for tokens in (first, *self.STEPS):
            step(wrapper, tokens, tokens)
            args = make(len(tokens))
            expected = exact(*args, tokens)
            compiled(*args)
            close(args[0], expected)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("first", (STEPS[0], STEPS[2]), ids=("busy", "idle"))
    def test_linear(self, ours, linear, first):
        layer, sizes = linear
        a, b = layer.lora_a_stacked, layer.lora_b_stacked

        def linear(y, x):
            ours.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, sizes)

        def make(rows):
            return torch.randn(rows, sum(sizes)), torch.randn(rows, K)

        self.run(linear, make, lambda y, x, tokens: formula(y, x, a, b, tokens), ours, first)

    def test_before_any_adapter_is_loaded(self, ours, lora_config):
        layer, sizes = down()
        layer.create_lora_weights(SLOTS, lora_config)
        ours.adopt(layer)
        counter = CompileCounter()

        @torch.compile(fullgraph=True, dynamic=True, backend=counter)
        def linear(y, x):
            ours.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, sizes)

        for tokens in ((0,) * 9, (1, 1, 0, 1)):
            step(ours, tokens)
            x, y = torch.randn(len(tokens), K), torch.randn(len(tokens), sum(sizes))
            exact = formula(y, x, layer.lora_a_stacked, layer.lora_b_stacked, tokens)
            linear(y, x)
            close(y, exact)
            load(layer, sizes, 0, 8)
        assert counter.frame_count == 1

    def test_sharded(self, ours, linear):
        layer, sizes = linear
        a, b = layer.lora_a_stacked, layer.lora_b_stacked

        def sharded(y, x):
            v = torch.zeros(len(sizes), x.shape[0], MAX_RANK)
            ours.add_shrink(v, x, layer.lora_a_stacked, 1.0)
            ours.add_expand(y, v, layer.lora_b_stacked, sizes, offset_start=0, add_input=True)

        def make(rows):
            return torch.randn(rows, sum(sizes)), torch.randn(rows, K)

        self.run(sharded, make, lambda y, x, tokens: formula(y, x, a, b, tokens), ours)


class TestWhatIsNotCovered:
    """Layers whose factors are in another dtype than the model, as an example of vLLM's own code below ours."""

    @pytest.fixture
    def uncovered(self, ours, lora_config):
        def make():
            layer, sizes = qkv()
            layer.base_layer.params_dtype = torch.bfloat16
            return layer, sizes

        return filled(make, ours, lora_config)

    def test_has_no_stack_and_vllms_metadata(self, ours, uncovered):
        assert ours.mixed
        assert stack_of(uncovered[0].lora_a_stacked) is None
        step(ours, TOKENS)
        if isinstance(ours, LoRAKernelsGPU):
            assert ours.token_mapping_meta.token_lora_mapping[: len(TOKENS)].tolist() == slots(TOKENS)
        else:
            assert ours.prefill_metadata[3] == 8  # runs of rows with one adapter

    def test_beside_what_is(self, both, ours, uncovered, linear):
        """Both in one step."""
        for layer, sizes in (linear, uncovered):
            wrappers = both()
            if layer is uncovered[0] and isinstance(ours, LoRAKernelsGPU):
                continue  # vLLM's kernels below need a GPU
            x, y = torch.randn(len(TOKENS), K), torch.randn(len(TOKENS), sum(sizes))
            exact = formula(y, x, layer.lora_a_stacked, layer.lora_b_stacked, TOKENS)
            for wrapper in wrappers:
                mine = y.clone()
                wrapper.add_lora_linear(mine, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, sizes)
                close(mine, exact)

    def test_mixtures_of_experts_are_vllms(self):
        for name in ("moe_lora_align_block_size", "add_lora_fused_moe", "add_lora_w13", "add_lora_w2"):
            assert getattr(LoRAKernelsGPU, name) is getattr(punica_gpu.PunicaWrapperGPU, name)
