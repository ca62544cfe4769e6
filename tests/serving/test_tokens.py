"""Greedy tokens are vLLM's own, whatever the adapters and however prompts are cut up and mixed.

vLLM's own CPU code gives rows without an adapter what is in the last slot. Where the two are compared in a batch with
such rows that slot is free; that ours are right without is in ``test_steps.py``.
"""

import itertools
from statistics import median

import inside
import llamas
import pytest

LENGTHS = (3, 41, 17, 1, 70, 8, 33, 5, 12, 26, 2, 64)
WRAPPERS = [["LoRAKernelsCPU"], ["PunicaWrapperCPU"]]


@pytest.fixture(scope="class")
def roomy(pair, tiny, adapters):
    """A slot more than there are adapters."""
    pair(inside.start, tiny, max_loras=len(adapters) + 1)
    assert pair(inside.wrappers) == WRAPPERS
    return pair


class TestSmallModel:
    def test_every_kind_of_adapter_in_one_batch(self, roomy, adapters):
        prompts = llamas.prompts(LENGTHS)
        requests = list(zip(prompts, [*adapters.values(), None], strict=True))
        ours, theirs = roomy(inside.generate, requests, new=12)
        assert ours == theirs
        plain = roomy.ours(inside.generate, [(prompt, None) for prompt in prompts], new=12)
        assert [a != b for a, b in zip(ours, plain, strict=True)] == [True] * len(adapters) + [False]

    def test_one_adapter_in_all_rows(self, roomy, adapters):
        ours, theirs = roomy(inside.generate, [(prompt, adapters["pattern"]) for prompt in llamas.prompts(LENGTHS)])
        assert ours == theirs

    def test_requests_that_end_at_different_times(self, roomy, adapters):
        folders = [*adapters.values(), None]
        requests = [
            (prompt, folders[i % len(folders)], 1 + 5 * i % 14)
            for i, prompt in enumerate(llamas.prompts(2 * LENGTHS, seed=1))
        ]
        ours, theirs = roomy(inside.generate, requests)
        assert ours == theirs


@pytest.fixture(scope="class")
def two_slots(pair, tiny):
    pair(inside.start, tiny, max_loras=2, max_cpu_loras=3)
    assert pair(inside.wrappers) == WRAPPERS
    return pair


class TestSlots:
    def test_adapters_that_take_turns(self, two_slots, adapters):
        """Each comes after another in its slot."""
        names = ("eight", "qv", "rslora", "up", "pattern", "qv", "down", "eight")
        requests = [(prompt, adapters[name]) for prompt, name in zip(llamas.prompts(LENGTHS[:8]), names, strict=True)]
        for round_ in range(3):
            ours, theirs = two_slots(inside.generate, requests[round_:] + requests[:round_])
            assert ours == theirs


@pytest.fixture(scope="class")
def other_dtype(pair, tiny):
    pair(inside.start, tiny, max_loras=4, lora_dtype="bfloat16")
    assert pair(inside.wrappers) == WRAPPERS
    return pair


class TestOtherDtype:
    def test_is_left_to_vllm(self, other_dtype, adapters):
        """Factors in bf16 under a model in fp32."""
        folders = [*(adapters[name] for name in ("eight", "qv", "ends")), None]
        requests = list(zip(llamas.prompts(LENGTHS[:4]), folders, strict=True))
        ours, steps = other_dtype.ours(inside.watched, requests)
        assert ours == other_dtype.theirs(inside.generate, requests)
        assert not any(step[op] for step in steps for op in inside.OPS)
        plain = other_dtype.ours(inside.generate, [(prompt, None) for prompt, _ in requests])
        assert [a != b for a, b in zip(ours, plain, strict=True)] == [True, True, True, False]


@pytest.fixture(scope="module")
def requests(smol, tmp_path_factory):
    """Eight adapters and none, for SmolLM2."""
    adapters = llamas.adapters(smol, tmp_path_factory.mktemp("adapters"), llamas.KINDS)
    return list(zip(llamas.prompts(LENGTHS[:9], range(1000, 40000)), [*adapters.values(), None], strict=True))


def answers(pair, smol, requests, dtype):
    """Ours and vLLM's tokens, with the logarithms of their probabilities."""
    pair(inside.start, smol, max_loras=9, max_lora_rank=16, dtype=dtype)
    assert pair(inside.wrappers) == WRAPPERS
    return pair(inside.generate, requests, new=16, logprobs=8)


@pytest.fixture(scope="module")
def exact(pair, smol, requests):
    return answers(pair, smol, requests, "float32")


class TestRealModel:
    """SmolLM2-135M-Instruct."""

    def test_fp32(self, pair, requests, exact):
        ours, theirs = exact
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        plain = pair.ours(inside.generate, [(prompt, None) for prompt, _ in requests], new=16)
        assert [a != b for (a, _), b in zip(ours, plain, strict=True)] == [True] * 8 + [False]

    def test_bf16(self, pair, smol, requests, exact):
        """Ours is as near to fp32 as vLLM is, and two tokens differ only where bf16 cannot tell them apart.

        Distances are of log p of tokens among the likeliest eight of both, as long as both have chosen the same tokens
        before. With e the greatest that vLLM's own have in a request, either of two runs can move two tokens by 2e.
        """
        ours, theirs = answers(pair, smol, requests, "bfloat16")
        mine, its = distances(ours, exact[1]), distances(theirs, exact[1])
        assert median(itertools.chain(*mine)) <= 1.2 * median(itertools.chain(*its))
        for (tokens, likely), (other_tokens, other_likely), noise in zip(ours, theirs, its, strict=True):
            step = next((i for i, (a, b) in enumerate(zip(tokens, other_tokens, strict=True)) if a != b), None)
            if step is not None:
                a, b = tokens[step], other_tokens[step]
                assert likely[step][a] - likely[step][b] <= 4 * max(noise)
                assert other_likely[step][b] - other_likely[step][a] <= 4 * max(noise)


def distances(rows, others):
    """Of each request."""
    found = []
    for (tokens, likely), (other_tokens, other_likely) in zip(rows, others, strict=True):
        same = [i for i in range(len(tokens)) if tokens[:i] == other_tokens[:i]]
        found.append([abs(p - other_likely[i][t]) for i in same for t, p in likely[i].items() if t in other_likely[i]])
    return found
