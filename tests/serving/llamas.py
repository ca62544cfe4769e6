"""Models and random PEFT adapters for them, in the folders that vLLM reads."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY, LAYERS = 512, 3


def tiny(folder):
    """A random Llama of three layers that two workers can share, whose head is not its embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=0, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


#: Adapters that differ in rank, by module too, in scaling and in the modules they are in.
KINDS = {
    "eight": {"r": 8},
    "one": {"r": 1, "lora_alpha": 1},
    "five": {"r": 5},
    "pattern": {"r": 4, "rank_pattern": {"q_proj": 12, "down_proj": 1}, "alpha_pattern": {"up_proj": 3}},
    "rslora": {"r": 16, "use_rslora": True, "lora_alpha": 2},
    "qv": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "up": {"r": 3, "target_modules": ["up_proj"]},
    "down": {"r": 16, "target_modules": ["o_proj", "down_proj"]},
}
ENDS = {
    "ends": {"r": 8, "target_modules": [*LINEARS, "embed_tokens", "lm_head"]},
    "head": {"r": 6, "target_modules": ["lm_head"]},
    "embedding": {"r": 7, "target_modules": ["embed_tokens", "q_proj"]},
}


def adapters(model, folder, kinds):
    """{name: folder} of adapters whose factors are random, saved by PEFT."""
    torch.manual_seed(1)
    base, model = AutoModelForCausalLM.from_pretrained(model), None
    for name, kind in kinds.items():
        options = {"lora_alpha": kind["r"], "target_modules": LINEARS, "init_lora_weights": False} | kind
        config = LoraConfig(**options | {"target_modules": list(options["target_modules"])})
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return {name: folder / name for name in kinds}


def prompts(lengths, vocabulary=range(1, VOCABULARY), seed=0):
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    low, high = vocabulary.start, vocabulary.stop
    return [torch.randint(low, high, (length,), generator=generator).tolist() for length in lengths]
