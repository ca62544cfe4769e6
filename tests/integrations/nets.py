"""Small PEFT models, and the same unpatched to hold them against."""

import copy
import functools

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import lora_kernels as lk
from lora_kernels.demo import texts

K, N = 24, 40


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.up = nn.Linear(K, N, bias=bias)
        self.down = nn.Linear(N, K, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def config(r=4, targets=("up", "down"), **kwargs):
    kwargs = {"lora_alpha": 6, "init_lora_weights": False, **kwargs}
    return LoraConfig(r=r, target_modules=list(targets), **kwargs)


def net(dtype=torch.float32, bias=True, masters=True, **kwargs):
    """A small PEFT model in eval mode; its adapter 'default' is anything but zero."""
    return get_peft_model(Net(bias).to(dtype), config(**kwargs), autocast_adapter_dtype=masters).eval()


def adapters(model=None):
    """A model with adapters that differ in rank, scaling and the layers they are in."""
    model = net() if model is None else model
    model.add_adapter("low", config(r=1, lora_alpha=3))
    model.add_adapter("up_only", config(r=7, targets=("up",), use_rslora=True))
    model.add_adapter("pattern", config(r=3, rank_pattern={"up": 5}, alpha_pattern={"down": 11}))
    return model.eval()


@functools.cache
def _llama(bias):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, attention_bias=bias, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )
    )  # fmt: skip


def llama(dtype=torch.float32, bias=False):
    """Two layers of seven LoRA linears, three adapters."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model = get_peft_model(copy.deepcopy(_llama(bias)).to(dtype), config(targets=targets, lora_alpha=16))
    model.add_adapter("one", config(r=2, targets=targets, lora_alpha=9))
    model.add_adapter("two", config(r=8, targets=("q_proj", "down_proj"), lora_alpha=40))
    return model.eval()


def write_tiny(path, intermediate_size=96):
    """A directory with a random two-layer Llama of 14 linear layers and a byte tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*texts.QUESTIONS, *texts.PIRATE], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)


LLAMA_LAYERS = 14
TOKENS = torch.arange(1, 25).reshape(4, 6)


def both(model):
    """(an unpatched copy, the model patched, its handle)."""
    oracle = copy.deepcopy(model)
    return oracle, model, lk.patch(model)


def close(actual, expected, **kwargs):
    torch.testing.assert_close(actual, expected, **{"rtol": 2e-5, "atol": 2e-5, **kwargs})


def warm(model, **kwargs):
    """Run the model, so that its layers keep what they found out of themselves."""
    with torch.no_grad():
        model(torch.randn(4, K), **kwargs)


def trained(model, x, **kwargs):
    """(output, dx, gradient of every parameter that has one)."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, **kwargs)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


BATCHES = (
    ["default", "low", "__base__", "pattern"],
    ["up_only", "low", "up_only", "default"],
    ["up_only", "up_only", "__base__", "__base__"],
    ["low", "low", "low", "low"],
    ("default", "__base__", "default", "low"),
)


def up_of(model):
    return model.base_model.model.up


def add_hook(module):
    module.register_forward_hook(lambda m, args, y: y * 1.5)


def replace_forward(module):
    module.forward = lambda x, f=module.forward, **kwargs: f(x, **kwargs) * 1.5


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Tagged(torch.Tensor):
    """Its results are tagged too."""


def tagged(weight):
    return nn.Parameter(weight.detach().as_subclass(Tagged), weight.requires_grad)


def swap_class(module, cls):
    module.__class__ = cls


def release(module):
    """What ZeRO-3 does: an empty parameter, gathered by a hook for the time of the module's call."""
    full = module.weight.data.clone()
    module.weight.data = torch.empty(0)
    module.register_forward_pre_hook(lambda m, args: setattr(m.weight, "data", full))
    module.register_forward_hook(lambda m, args, y: setattr(m.weight, "data", torch.empty(0)))


def gather_above(model):
    """The same with the hooks on the layer above, so that only the parameter's size tells, between the calls."""
    up_of(model).lora_A.default.weight.data = torch.empty(0)
