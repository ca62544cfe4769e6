"""What lora_kernels does in the steps of an engine: how often its ops run, its plans, its live ranks."""

import inside
import llamas
import pytest

LENGTHS = (40, 7, 3, 12, 9, 21, 5)
SITES = 4 * llamas.LAYERS  # qkv, o, gate and up, down


def ops(step):
    return sum(step[op] for op in inside.OPS)


@pytest.fixture(scope="module")
def full(pair, tiny, adapters):
    """An engine whose slots are all taken by adapters, beside one without LoRA."""
    pair.theirs.send(inside.start, tiny, lora=False)
    pair.ours(inside.start, tiny, max_loras=6)
    pair.theirs.receive()
    return pair


@pytest.fixture(scope="module")
def requests(adapters):
    names = ("eight", "pattern", "qv", "ends", "one", "rslora")
    """The one without an adapter ends first."""
    folders = [*(adapters[name] for name in names), None]
    return list(zip(llamas.prompts(LENGTHS), folders, [8] * 6 + [5], strict=True))


def plain(requests):
    return [(prompt, None, *new) for prompt, _, *new in requests]


def test_rows_without_an_adapter_are_the_models_own(full, requests):
    assert full.ours(inside.generate, requests)[-1] == full.theirs(inside.generate, plain(requests))[-1]


def test_no_op_runs_where_no_row_has_an_adapter(full, requests):
    full.ours(inside.generate, requests)  # so that slots hold adapters
    tokens, steps = full.ours(inside.watched, plain(requests))
    assert tokens == full.theirs(inside.generate, plain(requests))
    assert len(steps) >= 8
    assert [ops(step) for step in steps] == [0] * len(steps)


def test_ops_run_as_long_as_a_row_has_an_adapter(full, adapters):
    first, second = llamas.prompts((5, 6))
    _, steps = full.ours(inside.watched, [(first, adapters["eight"], 4), (second, None, 10)])
    assert [ops(step) > 0 for step in steps] == [True] * 4 + [False] * 6


def test_one_op_a_site_and_a_plan_for_all_of_them(full, requests):
    """Beside the linears' sites there are the embedding and the head. The plans are of tokens and of rows of logits."""
    _, steps = full.ours(inside.watched, requests)
    assert {ops(step) for step in steps} == {SITES + 2}
    assert {step["update_"] for step in steps[:4]} == {2}
    assert {step["update_"] for step in steps} <= {0, 2}
    assert {step["rows"] for step in steps} >= {32, len(requests)}


@pytest.fixture(scope="module")
def ranks(full, requests, adapters):
    """{adapter: {module: the live ranks of A and of B}}."""
    full.ours(inside.generate, requests)
    found = full.ours(inside.ranks)
    return {name: found[str(folder)] for name, folder in adapters.items() if str(folder) in found}


class TestLiveRanks:
    def layers(self, ranks, name, module):
        """The live ranks of A and B of a module in all layers, which are the same."""
        found = [ranks[name][f"model.layers.{i}.{module}"] for i in range(llamas.LAYERS)]
        assert found == found[:1] * llamas.LAYERS
        return found[0]

    @pytest.mark.parametrize(
        "name, qkv, o, gate_up, down",
        (
            ("eight", [8, 8, 8], [8], [8, 8], [8]),
            ("one", [1, 1, 1], [1], [1, 1], [1]),
            ("pattern", [12, 4, 4], [4], [4, 4], [1]),
            ("rslora", [16, 16, 16], [16], [16, 16], [16]),
            ("qv", [8, 0, 8], [0], [0, 0], [0]),
            ("ends", [8, 8, 8], [8], [8, 8], [8]),
        ),
    )
    def test_are_the_adapters(self, ranks, name, qkv, o, gate_up, down):
        assert self.layers(ranks, name, "self_attn.qkv_proj") == [qkv, qkv]
        assert self.layers(ranks, name, "self_attn.o_proj") == [o, o]
        assert self.layers(ranks, name, "mlp.gate_up_proj") == [gate_up, gate_up]
        assert self.layers(ranks, name, "mlp.down_proj") == [down, down]
        end = [8] if name == "ends" else [0]
        assert ranks[name]["lm_head"] == [end, end]
        assert ranks[name]["model.embed_tokens"] == [None, end]

    def test_nothing_past_them_is_read(self, full, requests, ranks):
        before = full.ours(inside.generate, requests)
        assert full.ours(inside.poison) > 0
        try:
            assert full.ours(inside.generate, requests) == before
        finally:
            full.ours(inside.heal)

    def test_of_another_adapter_in_the_same_slot(self, full, requests, adapters):
        """Six slots: the one that was not used for longest goes to the new adapter."""
        full.ours(inside.generate, requests)
        full.ours(inside.generate, requests[1:])
        full.ours(inside.generate, [(requests[0][0], adapters["up"])])
        found = full.ours(inside.ranks)
        assert str(adapters["eight"]) not in found
        assert found[str(adapters["up"])]["model.layers.1.mlp.gate_up_proj"] == [[0, 3], [0, 3]]
        assert found[str(adapters["up"])]["model.layers.1.self_attn.qkv_proj"] == [[0, 0, 0], [0, 0, 0]]
