"""What tests, ``lora-kernels check`` and the benchmarks share: samples of every op, fp64 oracles, the error rule,
times taken in turns.

A sample is one call of an op with everything that goes into it; an oracle computes the same call in float64 straight
from the formula, one row at a time, and shares no code with the package; ``plain`` computes it the way one writes it in
plain PyTorch in the sample's dtype, and its error is the yardstick of the error rule.
"""

from .lora_linear import (
    LORA_LINEAR_DTYPES,
    LORA_LINEAR_LEAVES,
    lora_linear_expected,
    lora_linear_gradients,
    lora_linear_oracle,
    lora_linear_plain,
    lora_linear_samples,
    lora_linear_upstream,
)
from .low_rank import (
    LOW_RANK_DTYPES,
    Dtypes,
    adapter_count,
    as_segments,
    expand_oracle,
    low_rank_oracle,
    low_rank_plain,
    low_rank_samples,
    low_rank_terms,
    shrink_oracle,
)
from .numerics import Sample, assert_within_rule, bitwise_equal, poison, rms, threads
from .quantized import (
    QUANTIZED_DTYPES,
    dequantize_oracle,
    quantized_expected,
    quantized_gradients,
    quantized_leaves,
    quantized_name,
    quantized_oracle,
    quantized_plain,
    quantized_samples,
    quantized_upstream,
    quantized_weight,
)
from .timing import ratio, take_turns
from .transforms import TRANSFORM_DTYPES, wht_noise, wht_oracle, wht_plain, wht_samples

__all__ = [
    "LORA_LINEAR_DTYPES",
    "LORA_LINEAR_LEAVES",
    "LOW_RANK_DTYPES",
    "Dtypes",
    "QUANTIZED_DTYPES",
    "Sample",
    "TRANSFORM_DTYPES",
    "adapter_count",
    "as_segments",
    "assert_within_rule",
    "bitwise_equal",
    "dequantize_oracle",
    "expand_oracle",
    "lora_linear_expected",
    "lora_linear_gradients",
    "lora_linear_oracle",
    "lora_linear_plain",
    "lora_linear_samples",
    "lora_linear_upstream",
    "low_rank_oracle",
    "low_rank_plain",
    "low_rank_samples",
    "low_rank_terms",
    "poison",
    "quantized_expected",
    "quantized_gradients",
    "quantized_leaves",
    "quantized_name",
    "quantized_oracle",
    "quantized_plain",
    "quantized_samples",
    "quantized_upstream",
    "quantized_weight",
    "ratio",
    "rms",
    "shrink_oracle",
    "take_turns",
    "threads",
    "wht_noise",
    "wht_oracle",
    "wht_plain",
    "wht_samples",
]
