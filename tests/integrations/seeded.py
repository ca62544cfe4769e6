"""The unpatched twin of a patched model: the same random numbers in the same order, so that the same must come out."""

import copy

import torch
from nets import close
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations.peft import FAST
from lora_kernels.reference.dropout import dropout_mask, keep_scale

BESIDE = f"{FAST} beside the base layer's own forward"


class SeededDropout(nn.Dropout):
    """torch's dropout with the kernels' mask: a seed drawn once a call, x̃ = mask∘x / (1 - p)."""

    def forward(self, x):
        if not (self.training and self.p):
            return x
        from lora_kernels.ops.lora_linear import draw_seed

        mask = dropout_mask(draw_seed(x), x.shape[:-1].numel(), x.shape[-1], self.p)
        return torch.where(mask.view(x.shape), x, 0) * keep_scale(self.p)


def seed_dropout(model, layers=None):
    """Seeded dropout in the adapter layers of these names, torch's in the others."""
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            held = [module for key, module in layer.named_children() if key.endswith("dropout")]
            for dropout in (dropout for dropouts in held for dropout in dropouts.values()):
                if type(dropout) in (nn.Dropout, SeededDropout):
                    dropout.__class__ = SeededDropout if layers is None or name in layers else nn.Dropout


class Pair:
    """A patched model and its unpatched twin."""

    def __init__(self, model):
        self.twin, self.model = copy.deepcopy(model), model
        self.handle = lk.patch(model)

    def __iter__(self):
        return iter((self.twin, self.model))

    def do(self, change):
        """The same to both, from the same random numbers; returns what it returned of each."""
        state = torch.get_rng_state()
        results = []
        for m in self:
            torch.set_rng_state(state)
            results.append(change(m))
        return results

    def same(self, calls, run, expected=FAST, **tolerances):
        """``run`` gives the same of both, draws as many random numbers, and goes the expected way.

        Args:
            calls: the fixture that counts the patched layers' calls.
            run: takes a model, returns tensors in any nesting.
            expected: ``FAST``, ``BESIDE`` or a word of the reason why the layers are slow; or a dictionary of these by
                the end of the layers' names.
            tolerances: as ``close`` takes them.

        Returns:
            What ``run`` returned of the patched model.
        """
        layers = self.handle.report().layers
        seed_dropout(self.twin, {name for name, reason in layers.items() if reason.startswith(FAST)})
        state = torch.get_rng_state()
        wanted = run(self.twin)
        drawn = torch.get_rng_state()
        torch.set_rng_state(state)
        calls.take()
        actual = run(self.model)
        counts = calls.take()
        close(actual, wanted, **tolerances)
        assert torch.equal(torch.get_rng_state(), drawn), "not as many random numbers were drawn"
        went(layers, counts, expected)
        return actual


def went(layers, counts, expected):
    """Assert which layers are fast, why the rest is not, and that they ran so.

    Args:
        layers: as in a report.
        counts: (fast, slow) calls.
        expected: as in :meth:`Pair.same`.
    """
    expected = expected if isinstance(expected, dict) else {"": expected}
    for end, word in expected.items():
        found = {name: reason for name, reason in layers.items() if name.endswith(end)}
        assert found, f"no layer {end}"
        for name, reason in found.items():
            assert (reason == FAST) if word == FAST else (word in reason and reason != FAST), f"{name}: {reason}"
    ran = [word.startswith(FAST) for word in expected.values() if not word.startswith("not patched")]
    assert bool(counts[0]) == any(ran), counts
    assert bool(counts[1]) == (not all(ran)), counts
