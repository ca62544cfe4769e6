"""LoRA's variants with a core: KaSA, y + s B (σ∘A x), and MiCA, whose forward is LoRA's over a frozen B."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from nets import K, Net, close, config, trained, up_of
from peft import PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from seeded import BESIDE, Pair, seed_dropout

import lora_kernels as lk
from lora_kernels.integrations.peft import FAST
from lora_kernels.testing.numerics import assert_within_rule

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]

KINDS = {"kasa": {"kasa_config": KasaConfig(), "init_lora_weights": True}, "mica": {"init_lora_weights": "mica"}}
EACH = pytest.mark.parametrize("kind", KINDS)
DROPOUT = pytest.mark.parametrize("dropout", (0.0, 0.4))


def stir(model):
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return model


def net(kind, dropout=0.0, dtype=torch.float32, masters=True, **kwargs):
    torch.manual_seed(2)
    settings = config(lora_dropout=dropout, **{**KINDS[kind], **kwargs})
    return stir(get_peft_model(Net().to(dtype), settings, autocast_adapter_dtype=masters)).train()


@EACH
class TestBoth:
    @DROPOUT
    @pytest.mark.parametrize("shape", ((1, K), (2, 3, K)))
    def test_outputs_and_gradients(self, calls, kind, shape, dropout):
        pair = Pair(net(kind, dropout))
        x = torch.randn(shape)
        grads = pair.same(calls, lambda m: trained(m, x))[2]
        assert sum("lora_diag" in name for name in grads) == (2 if kind == "kasa" else 0)
        assert sum("lora_B" in name for name in grads) == (2 if kind == "kasa" else 0)
        pair.do(lambda m: m.eval())
        pair.same(calls, lambda m: trained(m, x))
        with torch.no_grad():
            for _ in range(3):
                pair.same(calls, lambda m: m(x))

    @DROPOUT
    def test_beside_a_base_that_is_trained(self, calls, kind, dropout):
        pair = Pair(net(kind, dropout))
        pair.do(lambda m: up_of(m).base_layer.weight.requires_grad_())
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)), {"up": BESIDE, "down": FAST})

    def test_with_other_adapters(self, calls, kind):
        model = net(kind, 0.1)
        model.add_adapter("other", config(r=3, lora_dropout=0.3, **(KINDS[kind] if kind == "kasa" else {})))
        pair = Pair(stir(model).train())
        x = torch.randn(5, K)
        for train in (True, False):
            for names in (["default", "other"], "other", "default"):
                pair.do(lambda m, names=names: m.base_model.set_adapter(names))
                pair.do(lambda m, train=train: m.train(train))
                pair.same(calls, lambda m: trained(m, x))
        with torch.no_grad():
            names = ["default", "other", "__base__", "default", "other"]
            wanted, found = (m(x, adapter_names=names) for m in pair)
        close(found, wanted)
        assert calls.take() == ((0, 2) if kind == "kasa" else (2, 0))

    def test_changed_in_place_between_calls(self, calls, kind):
        pair = Pair(net(kind).eval())
        x = torch.randn(5, K)
        with torch.no_grad():
            first = pair.same(calls, lambda m: m(x))
            what = "lora_diag" if kind == "kasa" else "lora_A"
            pair.do(lambda m: [p.mul_(2) for n, p in m.named_parameters() if what in n])
            assert not torch.allclose(pair.same(calls, lambda m: m(x)), first)

    def test_merge_and_load(self, calls, kind, tmp_path):
        pair = Pair(net(kind).eval())
        x = torch.randn(5, K)
        with torch.no_grad():
            before = pair.same(calls, lambda m: m(x))
            pair.do(lambda m: m.merge_adapter())
            close(pair.same(calls, lambda m: m(x), "adapters merged"), before)
            pair.do(lambda m: m.unmerge_adapter())
            close(pair.same(calls, lambda m: m(x)), before)
            pair.model.save_pretrained(tmp_path)
            torch.manual_seed(2)
            again = PeftModel.from_pretrained(Net(), tmp_path).eval()
            assert lk.patch(again).report().fast == 2
            close(again(x), pair.twin(x))

    @DROPOUT
    @pytest.mark.parametrize("masters", (True, False))
    @pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
    def test_half_precision_is_no_less_exact_than_peft(self, calls, kind, dtype, masters, dropout):
        pair = Pair(net(kind, dropout, dtype, masters))
        seed_dropout(pair.twin)
        exact = copy.deepcopy(pair.twin).double()
        x = torch.randn(512, K).to(dtype)
        found = []
        for m, data in ((exact, x.double()), (pair.twin, x), (pair.model, x)):
            torch.manual_seed(1)
            y, dx, grads = trained(up_of(m), data)
            found.append({"y": y, "dx": dx, **{n: g for n, g in grads.items() if g.numel() > 99}})
        assert calls.take() == (1, 0)
        truth, expected, actual = found
        assert actual.keys() == expected.keys()
        for name, t in truth.items():
            assert actual[name].dtype == expected[name].dtype
            noise = 1e-6 * float(t.norm()) / t.numel() ** 0.5
            assert_within_rule(actual[name], t, expected[name], noise=noise, what=name)

    def test_autocast(self, calls, kind):
        pair = Pair(net(kind))
        with torch.autocast("cpu", torch.bfloat16):
            y = pair.same(calls, lambda m: m(torch.randn(64, K)).detach(), rtol=0.03, atol=0.05)
        assert y.dtype == torch.bfloat16

    def test_compiled(self, calls, kind):
        pair = Pair(net(kind).eval())
        x = torch.randn(4, K)
        torch._dynamo.reset()
        with torch.no_grad():
            close(torch.compile(pair.model, backend="eager")(x), pair.twin(x))


def test_truncation_that_is_still_to_come(calls):
    """PEFT truncates the base weight at the first call where it was on the meta device before."""
    model = net("kasa").eval()
    pair = Pair(model)
    x = torch.randn(5, K)
    with torch.no_grad():
        pair.do(lambda m: up_of(m)._lora_kasa_truncation_deferred.add("default"))
        weight = up_of(model).base_layer.weight.clone()
        pair.same(calls, lambda m: m(x), {"up": "truncation of the base weight is still to come", "down": FAST})
        assert not torch.equal(up_of(model).base_layer.weight, weight)
        pair.same(calls, lambda m: m(x))
