"""A model's costs per token, from its spec."""

from collections import Counter

from services.worker.models.spec import ModelSpec
from services.worker.work import StepCosts


def costs_of(spec: ModelSpec, itemsize: int) -> StepCosts:
    """`itemsize`: bytes of one weight, and of one number in the cache. A multiplication and an addition are two
    operations; norms, gates and rope are left out (below 1 % of any model's)."""
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    matrices = spec.num_layers * spec.hidden_size * (heads + 3 * spec.intermediate_size)
    head = spec.vocab_size * spec.hidden_size
    return StepCosts(
        flops_per_token=2 * matrices,
        flops_per_logits=2 * head,
        flops_per_pair=4 * spec.num_heads * spec.head_dim,  # scores, and the sum of values
        layer_bytes=matrices * itemsize,
        head_bytes=head * itemsize,
        embedding_bytes_per_token=spec.hidden_size * itemsize,
        kv_bytes_per_position=2 * spec.num_kv_heads * spec.head_dim * itemsize,
        windows=dict(Counter(spec.windows)),
    )
