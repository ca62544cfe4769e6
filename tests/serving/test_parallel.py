"""Two workers that share a model and each adapter's factors: tokens are those of vLLM's own with one worker."""

import inside
import llamas
import pytest
from remote import Remote

LENGTHS = (3, 41, 17, 1, 70, 8, 33, 5, 12, 26, 2, 64)


@pytest.fixture(scope="module")
def requests(adapters):
    return list(zip(llamas.prompts(LENGTHS), [*adapters.values(), None], strict=True))


@pytest.fixture(scope="module")
def theirs(pair, tiny, adapters, requests):
    pair.theirs(inside.start, tiny, max_loras=len(adapters) + 1)
    return pair.theirs(inside.generate, requests)


@pytest.fixture(scope="module")
def ours():
    """A process that has not had an engine."""
    remote = Remote()
    yield remote
    remote.close()


@pytest.mark.parametrize("sharded", (False, True), ids=("plain", "fully_sharded_loras"))
def test_tokens(ours, theirs, tiny, adapters, requests, sharded):
    options = {"tensor_parallel_size": 2, "fully_sharded_loras": sharded, "max_loras": len(adapters) + 1}
    ours(inside.start, tiny, **options)
    assert ours(inside.wrappers) == ["LoRAKernelsCPU"] * 2
    tokens, steps = ours(inside.watched, requests)
    assert tokens == theirs
    assert all(any(step[op] for step in steps) for op in (inside.OPS[1:] if sharded else inside.OPS[:1]))
