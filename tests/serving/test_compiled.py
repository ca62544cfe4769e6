"""The engine's graph, traced once, compiled and cached as on GPUs: right for other rows, other adapters and none."""

import inside
import llamas
import pytest
from remote import Remote

LENGTHS = (3, 41, 17, 1, 70, 8, 33, 5, 12, 26, 2, 64)


@pytest.fixture(scope="module")
def batches(adapters):
    prompts, folders = llamas.prompts(LENGTHS), [*adapters.values(), None]
    return [
        list(zip(prompts, folders, strict=True)),
        [(prompt, None) for prompt in prompts],
        [(prompts[3], adapters["qv"])],
        [(prompt, folders[i % 4], 1 + 3 * i) for i, prompt in enumerate(prompts[:7])],
        [(prompt, folders[-i % 12]) for i, prompt in enumerate(prompts)],
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    remote = Remote(VLLM_CACHE_ROOT=str(tmp_path_factory.mktemp("cache")))
    yield remote
    remote.close()


@pytest.fixture(scope="module")
def eager(pair, tiny, adapters, batches):
    """vLLM's own tokens."""
    pair.theirs(inside.start, tiny, max_loras=len(adapters) + 1)
    return [pair.theirs(inside.generate, batch) for batch in batches]


@pytest.mark.parametrize("counts", ((1, 0), (0, 1)), ids=("compiled", "from the cache"))
def test_tokens(compiled, tiny, adapters, batches, eager, counts):
    compiled(inside.start_compiled, tiny, max_loras=len(adapters) + 1)
    assert compiled(inside.wrappers) == ["LoRAKernelsCPU"]
    assert [compiled(inside.generate, batch) for batch in batches] == eager
    assert compiled(inside.graphs) == counts


def test_its_ops_are_in_the_graph(compiled, batches):
    """Python calls them for the logits only, which are not in it."""
    _, steps = compiled(inside.watched, batches[2])
    assert [[step[op] for op in inside.OPS] for step in steps] == [[1, 0, 0]] * len(steps)


def test_vllms_own_graph_has_another_key(compiled, eager, pair):
    """Its cache would else give the one for the other."""
    assert compiled(inside.graph_key) != pair.theirs(inside.graph_key)
