"""VeRA, AdaLoRA, DeLoRA, TinyLoRA, PSOFT and MiSS, patched, against the same unpatched."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import nets  # noqa: E402
from nets import K, N, Net, close, trained, up_of  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from relatives import KINDS, R, config, net, stir  # noqa: E402
from seeded import Pair, seed_dropout  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations.peft import FAST  # noqa: E402
from lora_kernels.testing.numerics import assert_within_rule  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]
EACH = pytest.mark.parametrize("kind", KINDS)
DROPOUT = pytest.mark.parametrize("dropout", (0.0, 0.4))


def changed(pair, calls, x):
    """What the adapters add is not small."""
    with torch.no_grad():
        on = pair.same(calls, lambda m: m(x))
        with pair.model.disable_adapter():
            off = pair.model(x)
    calls.take()
    return (on - off).norm() > 0.05 * on.norm()


@EACH
class TestGradients:
    @DROPOUT
    @pytest.mark.parametrize("bias", (True, False))
    @pytest.mark.parametrize("shape", ((1, K), (5, K), (2, 3, K)))
    def test_outputs_and_gradients(self, calls, kind, shape, bias, dropout):
        pair = Pair(net(kind, dropout, bias))
        x = torch.randn(shape)
        grads = pair.same(calls, lambda m: trained(m, x))[2]
        assert len(grads) == sum(p.requires_grad for p in pair.model.parameters()) > 0
        assert all(g.abs().max() > 0 for g in grads.values())
        pair.do(lambda m: m.eval())
        pair.same(calls, lambda m: trained(m, x))
        assert changed(pair, calls, x)

    @DROPOUT
    @pytest.mark.parametrize("r", (1, 3, 8))
    def test_ranks(self, calls, kind, r, dropout):
        """MiSS folds x into groups of r, of which 8 leaves none over of 24 and 40, and 3 one of 40."""
        if kind == "psoft" and r == 1:
            pytest.skip("PEFT's rotation needs two directions")
        pair = Pair(net(kind, dropout * (kind != "miss" or r != 3), r=r))
        pair.same(calls, lambda m: trained(m, torch.randn(5, K)))

    def test_dropout_without_gradients(self, calls, kind):
        pair = Pair(net(kind, 0.4))
        with torch.no_grad():
            first = pair.same(calls, lambda m: m(torch.ones(5, K)))
            assert not torch.equal(pair.same(calls, lambda m: m(torch.ones(5, K))), first)

    @pytest.mark.parametrize("reentrant", (True, False))
    def test_checkpointing(self, calls, kind, reentrant):
        """The mask is the same when the layer is computed again."""
        pair = Pair(net(kind, 0.4))
        x = torch.randn(5, K)

        def run(m):
            m.zero_grad()
            leaf = x.clone().requires_grad_()
            y = checkpoint(m, leaf, use_reentrant=reentrant)
            (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
            return y.detach(), leaf.grad, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        pair.same(calls, run)

    def test_no_rows(self, calls, kind):
        pair = Pair(net(kind))

        def run(m):
            m.zero_grad()
            y = m(torch.randn(0, K))
            y.sum().backward()
            return y.detach(), {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

        pair.same(calls, run)

    def test_nothing_is_trained_but_x(self, calls, kind):
        pair = Pair(net(kind))
        pair.do(lambda m: m.requires_grad_(False))
        _, dx, grads = pair.same(calls, lambda m: trained(m, torch.randn(5, K)))
        assert not grads
        assert dx.abs().max() > 0

    def test_trained_base_bias(self, calls, kind):
        pair = Pair(net(kind))
        pair.do(lambda m: up_of(m).base_layer.bias.requires_grad_())
        grads = pair.same(calls, lambda m: trained(m, torch.randn(5, K)))[2]
        assert any("base_layer.bias" in name for name in grads)

    def test_steps_of_training(self, calls, kind):
        pair = Pair(net(kind, 0.1))

        def run(m):
            optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01)
            losses = []
            for _ in range(3):
                x = torch.randn(16, K)
                loss = (m(x) - x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return losses

        losses = pair.same(calls, run)
        assert len({float(loss) for loss in losses}) == 3


@EACH
@DROPOUT
@pytest.mark.parametrize("masters", (True, False))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_no_less_exact_than_peft(calls, kind, dtype, masters, dropout):
    """Of one layer, against the same in fp64: outputs, dx, and gradients in the adapter's own dtype."""
    if kind == "hra" and masters:
        pytest.skip(
            "PEFT's copies the weight to fp32 at every pass, and rounds y once where a linear layer rounds twice"
        )
    model = net(kind, dropout, dtype=dtype, masters=masters)
    held = {p.dtype for p in model.parameters() if p.requires_grad}
    pair = Pair(model)
    if not masters and {up_dtype(model, kind)} != held:
        pytest.skip("PEFT itself refuses such a mixture of dtypes")
    assert pair.handle.report().fast == 2
    seed_dropout(pair.twin)
    exact = copy.deepcopy(pair.twin).double()
    x = torch.randn(512, K).to(dtype)
    found = []
    for m, data in ((exact, x.double()), (pair.twin, x), (pair.model, x)):
        torch.manual_seed(1)
        y, dx, grads = trained(up_of(m), data)
        found.append({"y": y, "dx": dx, **grads})
    assert calls.take() == (1, 0)
    truth, expected, actual = found
    assert actual.keys() == expected.keys()
    for name, t in truth.items():
        assert actual[name].dtype == expected[name].dtype
        noise = 1e-6 * float(t.norm()) / t.numel() ** 0.5
        if t.numel() < 100:  # too few for a share of 5 %
            slack = torch.finfo(actual[name].dtype).eps * t.norm()
            assert (actual[name] - t).norm() <= 1.05 * (expected[name] - t).norm() + slack, name
            continue
        assert_within_rule(actual[name], t, expected[name], noise=noise, what=name)


def up_dtype(model, kind):
    """What the frozen factors of a layer are held in."""
    layer = up_of(model)
    frozen = {"vera": "vera_A", "tinylora": "tinylora_A", "psoft": "_psoft_A_cache"}.get(kind)
    return getattr(layer, frozen)["default"].dtype if frozen else next(layer.parameters()).dtype


@EACH
class TestLifecycle:
    def second(self, m, kind):
        if kind == "adalora":
            m.peft_config["default"].inference_mode = True
        m.add_adapter("other", config(kind))
        torch.manual_seed(11)
        for name, p in m.named_parameters():
            if "other" in name and "ranknum" not in name:
                p.data += 0.5 * torch.randn_like(p)
        return m.train()

    def test_two_adapters_in_turn(self, calls, kind):
        pair = Pair(net(kind))
        pair.do(lambda m: self.second(m, kind))
        pair.handle = lk.patch(pair.model)
        x = torch.randn(5, K)
        outputs = []
        for name in ("default", "other", "default"):
            pair.do(lambda m, name=name: m.set_adapter(name))
            outputs.append(pair.same(calls, lambda m: trained(m, x))[0])
        close(outputs[0], outputs[2])
        assert not torch.allclose(outputs[0], outputs[1])
        pair.do(lambda m: m.base_model.set_adapter(["default", "other"]))
        with torch.no_grad():
            pair.same(calls, lambda m: m(x), "several active adapters")
        pair.do(lambda m: m.base_model.set_adapter("default"))
        pair.do(lambda m: m.delete_adapter("other"))
        close(pair.same(calls, lambda m: trained(m, x))[0], outputs[0])

    def test_disable_and_merge(self, calls, kind):
        pair = Pair(net(kind).eval())
        x = torch.randn(5, K)
        with torch.no_grad():
            before = pair.same(calls, lambda m: m(x))

            def disabled(m):
                with m.disable_adapter():
                    return m(x)

            base = disabled(pair.model)
            assert calls.take() == (0, 2)
            close(base, pair.twin.get_base_model().down.base_layer(
                torch.relu(pair.twin.get_base_model().up.base_layer(x))))  # fmt: skip
            pair.do(lambda m: m.merge_adapter())
            close(pair.same(calls, lambda m: m(x), "adapters merged"), before)
            pair.do(lambda m: m.unmerge_adapter())
            close(pair.same(calls, lambda m: m(x)), before, rtol=1e-4, atol=1e-4)

    def test_unload(self, calls, kind):
        pair = Pair(net(kind).eval())
        x = torch.randn(5, K)
        with torch.no_grad():
            before = pair.model(x)
            close([m(x) for m in pair.do(lambda m: m.merge_and_unload())], [before] * 2)

    def test_save_and_load(self, calls, kind, tmp_path):
        pair = Pair(net(kind).eval())
        assert list(pair.model.state_dict()) == list(pair.twin.state_dict())
        pair.model.save_pretrained(tmp_path)
        torch.manual_seed(3)
        again = PeftModel.from_pretrained(Net(), tmp_path).eval()
        assert lk.patch(again).report().fast == 2
        x = torch.randn(5, K)
        with torch.no_grad():
            close(again(x), pair.twin(x))
        assert calls.take() == (2, 0)

    def test_unpatch(self, calls, kind):
        model = net(kind)
        before = {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()}
        handle = lk.patch(model)
        assert all(type(layer) is not before[n][0] for n, layer in model.named_modules() if n.endswith(("up", "down")))
        assert "2 of 2 adapter layers fast" in str(handle.report())
        handle.unpatch()
        assert {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()} == before
        model(torch.randn(5, K))
        assert calls.take() == (0, 0)
        assert set(handle.report().layers.values()) == {"not patched (call patch again)"}

    def test_pickle_and_copy(self, calls, kind):
        pair = Pair(net(kind).eval())
        buffer = io.BytesIO(pickle.dumps(up_of(pair.model)))
        x = torch.randn(5, K)
        with torch.no_grad():
            for layer in (pickle.load(buffer), copy.deepcopy(up_of(pair.model))):
                close(layer(x), up_of(pair.twin)(x))
        assert calls.take() == (2, 0)


@pytest.mark.parametrize("kind", ("vera", "adalora", "tinylora"))
def test_conv1d(calls, kind):
    """Its weight is [K, N]."""

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = Conv1D(N, K), Conv1D(K, N)
            nn.init.normal_(self.up.bias)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    pair = Pair(net(kind, 0.4, base=Conv(), fan_in_fan_out=True))
    pair.same(calls, lambda m: trained(m, torch.randn(2, 3, K)))


@pytest.mark.parametrize(
    "options",
    (
        {"psoft_orth": False},
        {"psoft_mag_a": False, "psoft_mag_b": False},
        {"use_cayley_neumann": True},
        {"ab_svd_init": "pissa_init"},
    ),
    ids=str,
)
def test_kinds_of_psoft(calls, options):
    pair = Pair(net("psoft", **options))
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)))


def test_mini_miss(calls):
    """One block for all groups of mini_r outputs."""
    pair = Pair(net("miss", init_weights="mini", mini_r=4))
    assert up_of(pair.model).miss_block["default"].shape == (R, 4)
    pair.same(calls, lambda m: trained(m, torch.randn(5, K)))


def test_adalora_allocates(calls):
    """Ranks that its allocator masked, and then cut off, ranknum staying what it was."""
    pair = Pair(net("adalora"))
    x = torch.randn(5, K)
    pair.do(lambda m: [layer.lora_E["default"].data[1:3].zero_() for layer in (up_of(m), m.base_model.model.down)])
    pair.same(calls, lambda m: trained(m, x))
    kept = [True, False, False, True]
    pattern = {f"{end}.lora_E.default": kept for end in ("up", "down")}
    pair.do(lambda m: m.base_model.resize_modules_by_rank_pattern(pattern, "default"))
    assert up_of(pair.model).lora_A["default"].shape == (2, K)
    assert float(up_of(pair.model).ranknum["default"]) == R
    pair.same(calls, lambda m: trained(m, x))


def test_tuners_mixed_in_a_model(calls):
    """Each layer goes its own way; what is not patched is named."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.vera, self.lora, self.other = (Net() for _ in range(3))

        def forward(self, x):
            return self.other(self.lora(self.vera(x)))

    model = Three()
    torch.manual_seed(5)
    model.vera = net("vera")
    model.lora = get_peft_model(model.lora, nets.config())
    from peft import OFTConfig

    own = OFTConfig(oft_block_size=4, r=0, target_modules=["up", "down"])
    model.other = stir(get_peft_model(model.other, own))
    pair = Pair(model)
    expected = {f"{part}.base_model.model.{end}": FAST for part in ("vera", "lora") for end in ("up", "down")}
    expected |= {f"other.base_model.model.{end}": "not patched: oft.Linear" for end in ("up", "down")}
    layers = pair.handle.report().layers
    assert layers == expected
    with torch.no_grad():
        x = torch.randn(5, K)
        close(model(x), pair.twin(x))
    assert calls.take() == (4, 0)
    with pytest.raises(ValueError, match="2 of 6 adapter layers would stay slow"):
        lk.patch(pair.twin, strict=True)
    pair.handle.unpatch()
    assert [type(m) for m in model.modules()] == [type(m) for m in pair.twin.modules()]
