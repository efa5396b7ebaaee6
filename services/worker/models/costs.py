"""A model's costs per token, from its spec."""

from collections import Counter

from services.worker.models.size import attention_matrices, feed_forward_matrices
from services.worker.models.spec import ModelSpec
from services.worker.work import StepCosts


def costs_of(spec: ModelSpec, itemsize: int) -> StepCosts:
    """`itemsize`: bytes of one weight, and of one number in the cache. A multiplication and an addition are two
    operations; norms, gates and rope are left out (below 1 % of any model's). Of a mixture of experts those count that
    one token uses, in the bytes of a step too: the least that it may have to read."""
    _, active = feed_forward_matrices(spec.feed_forward, spec.hidden_size)
    matrices = spec.num_layers * (attention_matrices(spec) + active)
    head = spec.vocab_size * spec.embedded_width
    return StepCosts(
        flops_per_token=2 * matrices,
        flops_per_logits=2 * head,
        flops_per_pair=4 * spec.num_heads * spec.head_dim,  # scores, and the sum of values
        layer_bytes=matrices * itemsize,
        head_bytes=head * itemsize,
        embedding_bytes_per_token=spec.embedded_width * itemsize,
        kv_bytes_per_position=2 * spec.num_kv_heads * spec.head_dim * itemsize,
        windows=dict(Counter(spec.windows)),
    )
