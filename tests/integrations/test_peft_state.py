"""What users do to a PEFT model after patching it, against the same done to an unpatched one."""

import copy
import pickle

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from nets import BATCHES, LLAMA_LAYERS, TOKENS, K, Net, adapters, both, close, config, llama, net, up_of  # noqa: E402
from peft import PeftModel  # noqa: E402
from peft.helpers import rescale_adapter_scale  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from peft.utils.hotswap import hotswap_adapter  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations import _peft_reason  # noqa: E402
from lora_kernels.integrations.peft import FusedLinear  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]


class TestState:
    """What users do to a PEFT model after patching it."""

    @pytest.fixture
    def pair(self):
        return both(adapters())

    def check(self, pair, calls, fast=2, **kwargs):
        oracle, model, _ = pair
        x = torch.randn(4, K)
        calls.take()
        with torch.no_grad():
            close(model(x, **kwargs), oracle(x, **kwargs))
        assert calls.take() == (fast, 2 - fast)

    def test_scaling(self, pair, calls):
        for change in (
            lambda up: up.set_scale("default", 3.0),
            lambda up: up.scale_layer(0.5),
            lambda up: up.unscale_layer(),
            lambda up: up.scaling.update(default=0),
        ):
            for m in pair[:2]:
                change(m.base_model.model.up)
            self.check(pair, calls)
        with rescale_adapter_scale(pair[0], 0.3), rescale_adapter_scale(pair[1], 0.3):
            self.check(pair, calls)

    def test_switching_adding_and_deleting(self, pair, calls):
        for change in (
            lambda m: m.set_adapter("low"),
            lambda m: m.add_adapter("late", config(r=2)),
            lambda m: m.set_adapter("late"),
            lambda m: m.delete_adapter("low"),
            lambda m: (
                m.base_model.rename_adapter("late", "renamed") if hasattr(m.base_model, "rename_adapter") else None
            ),
        ):
            for m in pair[:2]:
                torch.manual_seed(1)
                change(m)
            self.check(pair, calls)
        self.check(pair, calls, adapter_names=["pattern", "default", "up_only", "__base__"])
        for m in pair[:2]:
            m.delete_adapter("late")  # the active one: PEFT picks another
        self.check(pair, calls)

    def test_disabled(self, pair, calls):
        oracle, model, handle = pair
        with oracle.disable_adapter(), model.disable_adapter():
            self.check(pair, calls, fast=0)
            assert set(handle.report().layers.values()) == {_peft_reason.DISABLED}
            lk.patch(model, strict=True)
        self.check(pair, calls)

    def test_merged_and_unmerged(self, pair, calls):
        for m in pair[:2]:
            m.merge_adapter()
        self.check(pair, calls, fast=0)
        assert set(pair[2].report().layers.values()) == {_peft_reason.MERGED}
        for m in pair[:2]:
            m.unmerge_adapter()
        self.check(pair, calls)

    def test_merge_and_unload(self, pair):
        x = torch.randn(4, K)
        expected = pair[0](x)
        merged = pair[1].merge_and_unload()
        assert type(merged.up) is nn.Linear
        close(merged(x), expected)

    def test_parameters_replaced(self, pair, calls):
        new = nn.Parameter(torch.randn(4, K))
        for m in pair[:2]:
            m.base_model.model.up.lora_A.default.weight = new
        self.check(pair, calls)
        for m in pair[:2]:
            m.base_model.model.up.lora_B["default"] = copy.deepcopy(m.base_model.model.up.lora_B["default"])
            m.base_model.model.up.lora_B.default.weight.data.mul_(2)
        self.check(pair, calls)

    def test_hotswap(self, pair, calls, tmp_path):
        other = net()
        other.save_pretrained(tmp_path)
        for m in pair[:2]:
            hotswap_adapter(m, str(tmp_path), adapter_name="default")
        self.check(pair, calls)
        assert torch.equal(up_of(pair[1]).lora_A.default.weight, up_of(other).lora_A.default.weight)

    def test_cast_of_the_whole_model(self, pair, calls):
        for m in pair[:2]:
            m.to(torch.bfloat16)
        x = torch.randn(4, K).bfloat16()
        close(pair[1](x), pair[0](x), rtol=0.05, atol=0.05)
        assert calls.take() == (2, 0)

    def test_late_targets_need_another_patch(self, calls):
        model = net(targets=("up",))
        first = lk.patch(model)
        model.add_adapter("more", config(targets=("up", "down")))
        model.set_adapter("more")
        assert first.report().layers["base_model.model.down"].startswith("not patched")
        model(torch.randn(4, K))
        assert calls.take() == (1, 0)
        second = lk.patch(model)
        assert first.report() == second.report()
        assert second.report().fast == 2
        model(torch.randn(4, K))
        assert calls.take() == (2, 0)
        second.unpatch()
        assert {type(m) for m in model.modules() if isinstance(m, PeftLinear)} == {PeftLinear}
        assert type(model.base_model) is peft.LoraModel

    def test_deepcopy_and_pickle(self, pair, calls):
        x = torch.randn(4, K)
        for clone in (copy.deepcopy(pair[1]), pickle.loads(pickle.dumps(pair[1]))):
            assert type(clone.base_model.model.up) is FusedLinear
            with torch.no_grad():
                assert torch.equal(clone(x), pair[1](x))
                clone.base_model.model.up.lora_A.default.weight.zero_()
                assert not torch.equal(clone(x), pair[1](x))
                names = BATCHES[0]
                close(pair[1](x, adapter_names=names), pair[0](x, adapter_names=names))
        assert calls.slow == 0

    def test_saved_and_loaded(self, pair, tmp_path):
        pair[1].save_pretrained(tmp_path)
        base = Net()
        base.load_state_dict({k: pair[1].state_dict()[f"base_model.model.{k.replace('.', '.base_layer.', 1)}"]
                              for k in base.state_dict()})  # fmt: skip
        loaded = PeftModel.from_pretrained(base, tmp_path)
        loaded.load_adapter(tmp_path / "low", "low")
        assert type(loaded.base_model.model.up) is PeftLinear
        x = torch.randn(4, K)
        assert torch.equal(loaded(x), pair[0](x))
        lk.patch(loaded)
        with torch.no_grad():
            assert torch.equal(loaded(x), pair[1](x))
            close(loaded(x, adapter_names=["low"] * 4), pair[0](x, adapter_names=["low"] * 4))

    @pytest.mark.parametrize("reentrant", (True, False))
    def test_gradient_checkpointing(self, calls, reentrant):
        model = llama()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        oracle, model, _ = both(model)
        for m in (oracle, model):
            m(TOKENS, labels=TOKENS).loss.backward()
        expected = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
        close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
        assert len(expected) == 2 * LLAMA_LAYERS
        assert calls.slow == 0
        assert calls.fast >= 2 * LLAMA_LAYERS - 2  # forward and recomputation, which stops early if not reentrant
