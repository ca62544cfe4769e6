"""QLoRA on a small language model: linear layers in bitsandbytes' NF4 with PEFT's LoRA, then patched by lora_kernels.

    python examples/qlora.py                                        # SmolLM2-135M on a page of Alice in Wonderland
    python examples/qlora.py --format fp4 --nested --steps 100
    python examples/qlora.py --model DIR --text FILE --plot losses.png

As finetune.py beside it, whose options it takes: the same seeds, each run in a process of its own. Needs what that
needs, bitsandbytes and accelerate.
"""

import sys

import finetune


def in_4_bits(args, device):
    """The model, its linear layers in 4 bits and the rest in bf16, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from lora_kernels.demo import model as models

    path = args.model or models.bundled_model(False)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.format,
        bnb_4bit_use_double_quant=args.nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with models.quiet():
        model = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=config, dtype=torch.bfloat16, device_map={"": device}, local_files_only=True
        )
        return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


if __name__ == "__main__":
    parser = finetune.parser(description=__doc__)
    parser.add_argument("--format", choices=("nf4", "fp4"), default="nf4", help="(default: %(default)s)")
    parser.add_argument("--nested", action="store_true", help="the scales in 8 bits (double quantisation)")
    args = parser.parse_args()
    base = f"bitsandbytes {args.format}{' nested' if args.nested else ''}"
    try:
        sys.exit(finetune.main(args, in_4_bits, base))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"qlora: {error}")
