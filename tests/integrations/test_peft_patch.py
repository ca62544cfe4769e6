"""``lora_kernels.patch``, its report and its end."""

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from nets import LLAMA_LAYERS, K, Net, adapters, both, close, llama, net, trained  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations import _peft_forward, _peft_layer, _peft_reason  # noqa: E402
from lora_kernels.integrations.peft import FusedLinear, FusedMixin  # noqa: E402
from lora_kernels.ops import _dispatch  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]


class TestPatch:
    def test_touches_nothing_but_classes(self):
        model = adapters()
        seen = []
        up = model.base_model.model.up
        up.register_forward_hook(lambda *_: seen.append("first"))
        up.register_forward_hook(lambda *_: seen.append("second"), prepend=True)
        before = {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()}
        state = model.state_dict(keep_vars=True)
        x = torch.randn(4, K)
        expected = model(x)

        handle = lk.patch(model)
        assert type(up) is FusedLinear
        patched = model.state_dict(keep_vars=True)
        assert list(patched) == list(state)
        assert all(patched[k] is state[k] for k in state)
        model(x)
        model(x, adapter_names=["low"] * 4)

        handle.unpatch()
        handle.unpatch()
        after = {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()}
        assert after == before
        seen.clear()
        assert torch.equal(model(x), expected)
        assert seen == ["second", "first"]

    def test_patching_twice_changes_nothing_more(self):
        model = net()
        first, second = lk.patch(model), lk.patch(model)
        assert type(model.base_model.model.up) is FusedLinear
        assert first.report() == second.report()
        first.unpatch()
        assert second.report().fast == 0

    def test_hooks_on_the_layer_still_run(self, calls):
        oracle, model, _ = both(net())
        for m in (oracle, model):
            m.base_model.model.up.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            m.base_model.model.up.register_full_backward_hook(lambda module, gi, go: (gi[0] * 3,))
        x = torch.randn(4, K)
        close(trained(model, x), trained(oracle, x))
        assert calls.take() == (2, 0)

    def test_refuses_what_has_no_lora_layer(self):
        with pytest.raises(ValueError, match="no PEFT adapter layer"):
            lk.patch(Net())
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            lk.patch("model")

    def test_strict(self):
        model = net()
        model.base_model.model.up.lora_A.default.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"1 of 2(.|\n)*model\.up: adapter 'default': lora_A has hooks"):
            lk.patch(model, strict=True)
        assert type(model.base_model.model.down) is PeftLinear
        assert lk.patch(net(), strict=True).report().fast == 2

    def test_says_when_nothing_runs_fast(self, caplog):
        with caplog.at_level("WARNING", "lora_kernels"):
            lk.patch(net().double())
        assert "none of the 2 adapter layers runs fast; 2: input is float64" in caplog.text

    def test_report(self):
        model = llama()
        handle = lk.patch(model)
        layers = model.base_model.model.model.layers
        layers[1].self_attn.q_proj.lora_B.default.register_forward_hook(lambda *_: None)
        report = handle.report()
        assert (report.fast, report.total) == (LLAMA_LAYERS - 1, LLAMA_LAYERS)
        name = "base_model.model.model.layers.1.self_attn.q_proj"
        assert report.layers[name] == "adapter 'default': lora_B has hooks"
        assert report.classes[name] == "FusedLinear"
        text = str(report)
        assert text.startswith("13 of 14 adapter layers fast (active default; eval mode; gradients on)")
        assert "    13  fast                                 FusedLinear" in text
        assert "     2  base_model.model.model.layers.*.self_attn.k_proj  fast" in text
        assert "13 of 14" in repr(handle)

    def test_class_of_a_wrapper_is_kept(self, calls):
        class Wrapper:
            marker = "wrapped"

        model = net()
        up, down = model.base_model.model.up, model.base_model.model.down
        up.__class__ = type("WrappedLinear", (Wrapper, PeftLinear), {})  # as FSDP2 does, before
        before = type(up)
        x = torch.randn(4, K)
        expected = model(x)
        handle = lk.patch(model)
        down.__class__ = type("WrappedFused", (Wrapper, type(down)), {"own": 1})  # and after
        with torch.no_grad():
            close(model(x), expected)
        assert calls.take() == (2, 0)
        assert isinstance(up, Wrapper)
        handle.unpatch()
        assert type(up) is before
        assert not isinstance(down, FusedMixin)
        assert (down.marker, down.own) == ("wrapped", 1)
        assert torch.equal(model(x), expected)

    def test_unforeseen_refusal_goes_to_peft_and_is_told(self, monkeypatch, caplog):
        oracle, model, _ = both(net())

        def refuse(*_):
            raise RuntimeError("no room")

        monkeypatch.setattr(_peft_forward, "linear", refuse)
        _peft_layer._warn_once.cache_clear()
        x = torch.randn(4, K)
        with torch.no_grad(), caplog.at_level("WARNING", "lora_kernels"):
            assert torch.equal(model(x), oracle(x))
        assert caplog.text.count("RuntimeError: no room") == 1

    def test_bad_input_raises_what_peft_raises(self):
        oracle, model, _ = both(net())
        for x in (torch.randn(4, K + 1), torch.randn(4, K).bfloat16(), torch.randint(9, (4, K))):
            with pytest.raises(RuntimeError) as expected:
                oracle(x)
            with pytest.raises(RuntimeError) as actual:
                model(x)
            assert str(actual.value) == str(expected.value)

    def test_without_a_kernel_peft_runs(self, monkeypatch, calls):
        oracle, model, handle = both(net())
        monkeypatch.setattr(_peft_forward, "_compiled", False)
        monkeypatch.setattr(_peft_reason, "extension_error", "never built")
        monkeypatch.setattr(_dispatch.Op, "backends", lambda self: frozenset({"reference"}))
        token = _dispatch._forced.set(None)
        try:
            x = torch.randn(4, K)
            assert torch.equal(model(x), oracle(x))
            assert calls.take() == (0, 2)
            assert handle.report().layers["base_model.model.up"] == "no cpu kernel here (never built)"
        finally:
            _dispatch._forced.reset(token)

    def test_backend_that_cannot_be_forced_raises(self):
        model = net()
        lk.patch(model)
        with torch.no_grad(), lk.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' does not run on cpu"):
            model(torch.randn(4, K))
