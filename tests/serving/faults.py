"""Small random models, adapters of which vLLM serves the whole, and adapters with one thing wrong each."""

import json
import math

import torch
from safetensors.torch import save_file

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 512, 128, 192, 3, 4, 2
HEAD = HIDDEN // HEADS
MAX_RANK = 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "dtype": "float32",
}
#: What has LoRA in a layer, with its input and output size.
ATTENTION = {
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD),
    "self_attn.o_proj": (HEADS * HEAD, HIDDEN),
}
DOWN = {"mlp.down_proj": (INNER, HIDDEN)}
LINEARS = ATTENTION | {"mlp.gate_proj": (HIDDEN, INNER), "mlp.up_proj": (HIDDEN, INNER)} | DOWN
#: Where q, k, v and gate, up are one linear in checkpoints too.
FUSED = DOWN | {
    "self_attn.o_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.qkv_proj": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD),
    "mlp.gate_up_proj": (HIDDEN, 2 * INNER),
}
Q0, K1, DOWN2 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.2.mlp.down_proj"


def model(folder, kind, **options):
    """A random model of an architecture of transformers, with a tokenizer whose words are its ids."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    architecture = getattr(transformers, kind)
    architecture(architecture.config_class(**SIZES | options)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)
    return folder


def key(module, kind):
    return f"base_model.model.{module}.lora_{kind}.weight"


def factors(linears=LINEARS, layers=range(LAYERS), rank=8, seed=1, ranks=None, path="model.layers"):
    """A and B of linears in each of some layers, by the names that PEFT saves them under."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for name, (size_in, size_out) in linears.items():
            r = (ranks or {}).get(name.split(".")[-1], rank)
            tensors[key(f"{path}.{layer}.{name}", "A")] = 0.3 * torch.randn(r, size_in, generator=generator)
            tensors[key(f"{path}.{layer}.{name}", "B")] = 0.3 * torch.randn(size_out, r, generator=generator)
    return tensors


def ends(rank=8, vocabulary=VOCABULARY):
    """Factors of the embedding and the head, and the weight that PEFT may save beside the former."""
    generator = torch.Generator().manual_seed(2)
    embedding = "base_model.model.model.embed_tokens"
    return {
        f"{embedding}.lora_embedding_A": 0.3 * torch.randn(rank, VOCABULARY, generator=generator),
        f"{embedding}.lora_embedding_B": 0.3 * torch.randn(HIDDEN, rank, generator=generator),
        f"{embedding}.base_layer.weight": torch.zeros(VOCABULARY, HIDDEN),
        key("lm_head", "A"): 0.3 * torch.randn(rank, HIDDEN, generator=generator),
        key("lm_head", "B"): 0.3 * torch.randn(vocabulary, rank, generator=generator),
    }


def save(folder, tensors, **config):
    """An adapter's folder; the tensors in another form than safetensors where ``config`` has a ``file``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = config.pop("file", "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    torch.save(tensors, folder / file) if file.endswith(".bin") else save_file(tensors, folder / file)
    return folder


def resized(by):
    """Factors of a model whose sizes are others."""
    return factors({name: (int(by * n_in), int(by * n_out)) for name, (n_in, n_out) in LINEARS.items()})


def changed(module, kind, change):
    """Factors of which one is changed, and left out where that gives None."""
    tensors = factors()
    tensor = change(tensors.pop(key(module, kind)))
    return tensors if tensor is None else tensors | {key(module, kind): tensor}


def holding(module, kind, value):
    def change(tensor):
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return changed(module, kind, change)


#: What is wrong: the tensors, what of the configuration is not as usual, and what the error says of it.
FAULTS = {
    "smaller model": (resized(0.5), {}, rf"lora_A is \[8, {INNER // 2}\], not \[rank, {INNER}\]"),
    "larger model": (resized(2), {}, rf"lora_A is \[8, {INNER * 2}\], not \[rank, {INNER}\]"),
    "deeper model": (factors(layers=range(LAYERS + 1)), {}, rf"layers.{LAYERS}.\S+: the model has no such module"),
    "other family": (factors(path="transformer.h"), {}, r"transformer.h.0.\S+: the model has no such module"),
    "transposed": (changed(DOWN2, "A", torch.t), {}, rf"{DOWN2}: lora_A is \[{INNER}, 8\], not \[rank, {INNER}\]"),
    "heads of q": (
        changed(K1, "B", lambda b: torch.cat((b, b))),
        {},
        rf"{K1}: lora_B is \[{HEADS * HEAD}, 8\], not \[{KV_HEADS * HEAD}, rank\]",
    ),
    "one dimension": (changed(Q0, "A", torch.flatten), {}, rf"{Q0}: lora_A is \[{8 * HIDDEN}\], not"),
    "ranks differ": (changed(DOWN2, "B", lambda b: b[:, :4]), {}, rf"{DOWN2}: lora_A has rank 8 and lora_B 4"),
    "rank in config": (factors(rank=32), {"r": 32}, rf"rank 32 is greater than max_lora_rank {MAX_RANK}"),
    "rank in tensors": (factors(rank=32), {}, rf"\S+: rank 32 is not within max_lora_rank {MAX_RANK}"),
    "no B": (changed(DOWN2, "B", lambda _: None), {}, f"{DOWN2}: lora_B is missing"),
    "no A": (changed(K1, "A", lambda _: None), {}, f"{K1}: lora_A is missing"),
    "no tensors": ({}, {}, "it has no LoRA tensors"),
    "nan": (holding(DOWN2, "A", math.nan), {}, f"{DOWN2}: lora_A has values that are not finite in torch.float32"),
    "inf": (holding(K1, "B", -math.inf), {}, f"{K1}: lora_B has values that are not finite in torch.float32"),
    "too large": (holding(K1, "B", 3e38), {}, f"{K1}: lora_B .* not finite in torch.float32 times 2"),
    "scaling": (factors(), {"lora_alpha": math.nan}, r"lora_B .* not finite in torch.float32 times nan"),
    "head": (
        factors() | ends(vocabulary=VOCABULARY - 8),
        {},
        rf"lm_head: lora_B is \[{VOCABULARY - 8}, 8\], not \[{VOCABULARY}, rank\]",
    ),
}  # fmt: skip

#: Adapters that are right, however few or uneven their modules.
RIGHT = {
    "all": (factors(), {}),
    "one module": (factors(DOWN, [1]), {}),
    "one of a packed module": (factors({"self_attn.v_proj": LINEARS["self_attn.v_proj"]}), {}),
    "ranks by module": (
        factors(ranks={"k_proj": 3, "down_proj": MAX_RANK}),
        {"rank_pattern": {"k_proj": 3, "down_proj": MAX_RANK}, "alpha_pattern": {"o_proj": 5}},
    ),
    "rslora": (factors(rank=MAX_RANK), {"r": MAX_RANK, "use_rslora": True}),
    "embedding and head": (ends(), {}),
    "bare names": ({name.removeprefix("base_model.model."): t for name, t in factors(seed=4).items()}, {}),
    "pickled": (factors(seed=5), {"file": "adapter_model.bin"}),
}
