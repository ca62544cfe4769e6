"""What the kernels do not take goes to PEFT's own forward and is named."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from nets import (  # noqa: E402
    BATCHES,
    Doubling,
    K,
    N,
    Tagged,
    adapters,
    add_hook,
    both,
    close,
    config,
    gather_above,
    net,
    release,
    replace_forward,
    swap_class,
    tagged,
    trained,
    up_of,
    warm,
)
from peft import get_peft_model  # noqa: E402
from peft.helpers import disable_input_dtype_casting  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor  # noqa: E402

import lora_kernels as lk  # noqa: E402
from lora_kernels.integrations.peft import FAST  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("a_backend")]


CHANGES = {
    "hook on lora_A": (lambda m: add_hook(up_of(m).lora_A.default), "lora_A has hooks"),
    "hook on lora_B": (lambda m: add_hook(up_of(m).lora_B.default), "lora_B has hooks"),
    "backward hook on lora_B": (
        lambda m: up_of(m).lora_B.default.register_full_backward_hook(lambda mod, gi, go: (2 * gi[0],)),
        "lora_B has hooks",
    ),
    "hook on dropout": (lambda m: add_hook(up_of(m).lora_dropout.default), "dropout has hooks"),
    "hook on base": (lambda m: add_hook(up_of(m).base_layer), "base layer has hooks"),
    "pre-hook on base": (
        lambda m: up_of(m).base_layer.register_forward_pre_hook(lambda mod, args: (args[0] + 1,)),
        "base layer has hooks",
    ),
    "forward of base replaced": (
        lambda m: replace_forward(up_of(m).base_layer),
        "base layer: its forward",
    ),
    "forward of lora_A replaced": (
        lambda m: replace_forward(up_of(m).lora_A.default),
        "lora_A: its forward",
    ),
    "other base class": (lambda m: swap_class(up_of(m).base_layer, Doubling), "base layer is Doubling"),
    "other lora_A class": (lambda m: swap_class(up_of(m).lora_A.default, Doubling), "lora_A is Doubling"),
    "other lora_B class": (lambda m: swap_class(up_of(m).lora_B.default, Doubling), "lora_B is Doubling"),
    "base weight of a subclass": (
        lambda m: setattr(up_of(m).base_layer, "weight", tagged(up_of(m).base_layer.weight)),
        "base layer: its weight is Tagged",
    ),
    "lora_A with a bias": (
        lambda m: up_of(m).lora_A.default.register_parameter("bias", nn.Parameter(torch.ones(4))),
        "lora_A has a bias",
    ),
    "custom dropout": (lambda m: up_of(m).lora_dropout.update({"default": nn.Hardtanh()}), "dropout is Hardtanh"),
    "parametrized base": (
        lambda m: nn.utils.parametrizations.weight_norm(up_of(m).base_layer),
        "base layer is ParametrizedLinear",
    ),
    "weight-normed lora_B": (
        lambda m: nn.utils.parametrizations.weight_norm(up_of(m).lora_B.default),
        "lora_B is ParametrizedLinear",
    ),
    "base weight requires grad": (
        lambda m: up_of(m).base_layer.weight.requires_grad_(),
        "base weight requires grad",
    ),
    "lora_A of a subclass": (
        lambda m: setattr(up_of(m).lora_A.default, "weight", tagged(up_of(m).lora_A.default.weight)),
        "lora_A: its weight is Tagged",
    ),
    "ZeRO-3 lora_A": (lambda m: release(up_of(m).lora_A.default), "lora_A has hooks"),
    "ZeRO-3 base": (lambda m: release(up_of(m).base_layer), "base layer has hooks"),
    "tensor scaling": (lambda m: up_of(m).scaling.update(default=torch.tensor(0.7)), "scaling is a Tensor"),
    "adapters in bf16": (
        lambda m: (up_of(m).lora_A.default.bfloat16(), up_of(m).lora_B.default.bfloat16()),
        "lora_A is bfloat16, the input float32",
    ),
}


class TestFallback:
    """Each thing the kernels don't take is noticed at the call, goes to PEFT with the same result, and is named."""

    def check(self, pair, calls, reason, fast=1, slow=1, x=None):
        oracle, model, handle = pair
        x = torch.randn(4, K) if x is None else x
        calls.take()
        run = trained if torch.is_grad_enabled() else lambda m, x: m(x)
        torch.manual_seed(3)
        expected = run(oracle, x)
        torch.manual_seed(3)
        close(run(model, x), expected)
        assert calls.take() == (fast, slow)
        assert reason in handle.report().layers["base_model.model.up"]

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("when", ("before", "after", "after a call"))
    def test_layer_changed(self, calls, change, when):
        released = change.startswith("ZeRO-3")
        fast = 0 if change.endswith("of a subclass") else 1  # the input of the layer behind it is tagged
        change, reason = CHANGES[change]
        model = net()
        oracle = copy.deepcopy(model)
        if when != "before":
            lk.patch(model)
        if when == "after a call":
            warm(model)
            calls.take()
        for m in (oracle, model):
            change(m)
        beside = "base" in reason and fast == 1
        reason = f"{FAST} beside the base layer's own forward: {reason}" if beside else reason
        with torch.set_grad_enabled(not released):
            self.check((oracle, model, lk.patch(model)), calls, reason, fast + beside, 2 - fast - beside)

    @pytest.mark.parametrize(
        "change",
        (
            "hook on lora_A",
            "hook on lora_B",
            "hook on dropout",
            "hook on base",
            "forward of lora_A replaced",
            "other lora_A class",
            "tensor scaling",
        ),
    )
    def test_layer_changed_in_a_mixed_batch(self, calls, change):
        change, _ = CHANGES[change]
        pair = both(adapters())
        warm(pair[1], adapter_names=BATCHES[0])
        calls.take()
        for m in pair[:2]:
            change(m)
        x = torch.randn(4, K)
        with torch.no_grad():
            close(pair[1](x, adapter_names=BATCHES[0]), pair[0](x, adapter_names=BATCHES[0]))
        assert calls.take() == ((2, 0) if change is CHANGES["hook on base"][0] else (1, 1))

    def test_only_the_adapter_concerned_is_slow(self, calls):
        model = net()
        model.add_adapter("dora", config(use_dora=True))
        pair = both(model)
        for active, expected in (("default", (2, 0)), (["default", "dora"], (0, 2)), ("dora", (2, 0))):
            for m in pair[:2]:
                m.base_model.set_adapter(active)
            x = torch.randn(4, K)
            close(pair[1](x), pair[0](x))
            assert calls.take() == expected

    def test_dora_in_a_mixed_batch_raises_as_peft_does(self):
        _, model, _ = both(net(use_dora=True))
        with pytest.raises(ValueError, match="when DoRA is enabled"):
            model(torch.randn(4, K), adapter_names=["default"] * 4)

    def test_fp64(self, calls):
        pair = both(net(torch.float64))
        self.check(pair, calls, "input is float64", 0, 2, x=torch.randn(4, K).double())

    def test_global_hooks(self, calls):
        pair = both(net())
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, y: y * 1.5 if isinstance(m, nn.Linear) else y
        )
        try:
            self.check(pair, calls, "global module hooks", 0, 2)
        finally:
            handle.remove()

    def test_functional_call_and_transforms(self, calls):
        oracle, model, _ = both(net())
        x = torch.randn(4, K)
        close(torch.func.vmap(model)(x), torch.func.vmap(oracle)(x))
        close(torch.func.jvp(model, (x,), (x,)), torch.func.jvp(oracle, (x,), (x,)))
        tensors = {n: torch.randn_like(p) for n, p in model.named_parameters()}
        close(torch.func.functional_call(model, tensors, (x,)), torch.func.functional_call(oracle, tensors, (x,)))
        assert calls.take() == (0, 6)

    def test_forward_mode_differentiation(self, calls):
        oracle, model, handle = both(net())
        x, t = torch.randn(4, K), torch.randn(4, K)
        with forward_ad.dual_level():
            close(forward_ad.unpack_dual(model(forward_ad.make_dual(x, t))).tangent,
                  forward_ad.unpack_dual(oracle(forward_ad.make_dual(x, t))).tangent)  # fmt: skip
            assert (
                handle.report().layers["base_model.model.up"] == "global module hooks or forward-mode differentiation"
            )
        assert calls.take() == (0, 2)

    def test_input_subclass(self, calls):
        oracle, model, _ = both(net())
        x = torch.randn(4, K).as_subclass(Tagged)
        close(model(x), oracle(x))
        assert calls.take() == (0, 2)

    def test_input_dtype_casting_disabled(self, calls):
        pair = both(net())
        with disable_input_dtype_casting(pair[0]), disable_input_dtype_casting(pair[1]):
            self.check(pair, calls, "input dtype casting is disabled", 0, 2)

    def test_extra_arguments(self, calls):
        oracle, model, _ = both(net())
        x = torch.randn(4, K)
        close(up_of(model)(x, alora_offsets=None), up_of(oracle)(x, alora_offsets=None))
        assert calls.take() == (0, 0)
        for m in (oracle, model):
            with pytest.raises(TypeError, match="positional argument"):
                up_of(m)(x, x)

    def test_released_parameter_without_hooks(self, calls):
        """An empty factor is refused, and the error is PEFT's."""
        oracle, model, handle = both(net())
        for m in (oracle, model):
            gather_above(m)
        x = torch.randn(4, K)
        with pytest.raises(RuntimeError) as expected:
            oracle(x)
        with pytest.raises(RuntimeError) as actual:
            model(x)
        assert str(actual.value) == str(expected.value)
        assert "its weight is [0] here" in handle.report().layers["base_model.model.up"]

    def test_dtensor(self, calls):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            oracle, model, handle = both(net())
            mesh = DeviceMesh("cpu", [0])
            for m in (oracle, model):
                for factor in (up_of(m).lora_A.default, up_of(m).lora_B.default):
                    factor.weight = nn.Parameter(distribute_tensor(factor.weight.detach(), mesh, [Replicate()]))
                    factor.register_forward_pre_hook(lambda mod, args: (torch.distributed.tensor.DTensor.from_local(
                        args[0], mesh, [Replicate()]) if not hasattr(args[0], "to_local") else args[0],))  # fmt: skip
                up_of(m).lora_B.default.register_forward_hook(lambda mod, args, y: y.to_local())
            x = torch.randn(4, K)
            with torch.no_grad():
                close(model(x), oracle(x))
            assert calls.take() == (1, 1)
            for factor in (up_of(model).lora_A.default, up_of(model).lora_B.default):
                factor._forward_pre_hooks.clear()
                factor._forward_hooks.clear()
            assert "its weight is DTensor" in handle.report().layers["base_model.model.up"]
        finally:
            torch.distributed.destroy_process_group()

    def test_fsdp2(self, calls):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            for order in ("shard first", "patch first"):
                model = net()
                oracle = copy.deepcopy(model)
                steps = [lambda m=model: torch.distributed.fsdp.fully_shard(up_of(m), mesh=DeviceMesh("cpu", [0])),
                         lambda m=model: lk.patch(m)]  # fmt: skip
                for step in steps if order == "shard first" else reversed(steps):
                    step()
                x = torch.randn(4, K)
                y = model(x)
                y.sum().backward()
                expected = oracle(x)
                expected.sum().backward()
                close(y, expected)
                grad = up_of(model).lora_A.default.weight.grad
                close(grad.full_tensor(), up_of(oracle).lora_A.default.weight.grad)
                assert calls.take() == (2, 0)
        finally:
            torch.distributed.destroy_process_group()

    def test_other_layers(self, calls):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(16, K)
                self.up = transformers.pytorch_utils.Conv1D(N, K)
                self.down = nn.Linear(N, K)

            def forward(self, ids):
                return self.down(self.up(self.embed(ids)))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(Mixed(), config(targets=("embed", "up", "down"), fan_in_fan_out=True))
        oracle, model, handle = both(model)
        ids = torch.randint(16, (4, 3))
        close(model(ids), oracle(ids))
        assert calls.take() == (2, 0)
        report = handle.report()
        assert report.layers == {
            "base_model.model.embed": "Embedding is not PEFT's LoRA over torch.nn.Linear",
            "base_model.model.up": FAST,
            "base_model.model.down": FAST,
        }
        assert (report.fast, report.total) == (2, 3)

    def test_subclass_with_its_own_forward(self, calls):
        class Louder(PeftLinear):
            def forward(self, x, *args, **kwargs):
                return 3 * super().forward(x, *args, **kwargs)

        model = net()
        up_of(model).__class__ = Louder
        oracle, model, handle = both(model)
        x = torch.randn(4, K)
        close(model(x), oracle(x))
        assert type(up_of(model)) is Louder
        assert "has its own forward" in handle.report().layers["base_model.model.up"]

    def test_instance_forward_on_the_layer(self, calls):
        model = net()
        replace_forward(up_of(model))
        handle = lk.patch(model)
        model(torch.randn(4, K))
        assert calls.take() == (1, 0)
        assert "forward was replaced on the instance" in handle.report().layers["base_model.model.up"]

    def test_accelerate_hook_after_patching_stays_fast(self, calls):
        hooks = pytest.importorskip("accelerate.hooks")
        model = net()
        handle = lk.patch(model)
        hooks.add_hook_to_module(up_of(model), hooks.ModelHook())
        with contextlib.suppress(AttributeError):
            model(torch.randn(4, K))
        assert calls.take() == (2, 0)
        assert handle.report().fast == 2
