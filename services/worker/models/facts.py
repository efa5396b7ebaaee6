"""What a model is and what serving it takes, from its spec alone: sizes, cache, and where a device's arithmetic becomes
the limit instead of its memory.

The rules of thumb and their exact forms:

- A layer of four hidden² matrices for attention and two of 4 · hidden² has 12 · hidden² parameters; `sizes_of` counts
  those that there are.
- K and V of a token take 2 · 2 · layers · heads · head_dim bytes at two bytes a number; heads are those of K and V.
- Layers that see the same window share blocks and let go of them (shared/cache_groups.py), so a request holds fewer
  than its tokens fill.
- A weight that is read costs its bytes once a step and two operations for each row. A step of B rows takes as long to
  compute as to read at B* = operations a second over bytes a second, at two bytes a weight. Of experts all are read and
  few compute, so that takes more rows. Reading the cache takes its share of each row's time, so with a long context it
  takes still more, or cannot be reached.
"""

import msgspec

from services.worker.models.costs import costs_of
from services.worker.models.size import Sizes, attention_matrices, feed_forward_matrices, sizes_of
from services.worker.models.spec import ModelSpec
from shared.cache_groups import group_layers, held_blocks


class WindowFacts(msgspec.Struct, frozen=True):
    """Layers that keep so many positions (None: all), and their cache for one position."""

    window: int | None
    layers: int
    bytes_per_token: int


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, numbers and rows; rows are sequences that decode together."""

    architecture: str
    dtype: str
    sizes: Sizes
    total_parameters: int
    active_parameters: int
    rule_of_thumb: int
    """12 · layers · hidden²."""
    weight_bytes: int
    kv_bytes_per_token: int
    windows: tuple[WindowFacts, ...]
    context: int
    block_size: int
    block_bytes: int
    num_groups: int
    """Cache groups: a block is of one of them."""
    num_blocks: int
    """That fit beside the weights."""
    requests: int
    """Of `context` tokens, that fit into them at their most."""
    ratio: float
    """B*: the device's operations over its bytes a second."""
    compute_bound_rows: float
    """From so many rows on a step takes longer to compute than to read its weights."""
    compute_bound_rows_at_context: float | None
    """The same with the cache of `context` tokens a row; None: at no number of rows."""


def facts_of(
    spec: ModelSpec,
    *,
    dtype: str,
    itemsize: int,
    context: int,
    block_size: int,
    chunk: int,
    memory_bytes: int,
    flops: float,
    bytes_per_second: float,
) -> ModelFacts:
    """`memory_bytes` is what weights and cache may take between them; `itemsize` bytes of a weight, and of a number in
    the cache; `chunk` the most tokens that a step takes of a prompt."""
    sizes, costs = sizes_of(spec), costs_of(spec, itemsize)
    windows = tuple(
        WindowFacts(window, layers, layers * costs.kv_bytes_per_position) for window, layers in costs.windows.items()
    )
    kv_bytes = sum(each.bytes_per_token for each in windows)
    groups = group_layers(spec.windows)
    block_bytes = groups.layers * costs.kv_bytes_per_position * block_size
    num_blocks = max(0, memory_bytes - sizes.total * itemsize) // block_bytes
    all_matrices, active = _matrices(spec)
    read_seconds = all_matrices * itemsize / bytes_per_second
    seen = sum(each.layers * min(context, each.window or context) for each in windows)
    row_seconds = (2 * active + seen * costs.flops_per_pair) / flops
    cache_seconds = seen * costs.kv_bytes_per_position / bytes_per_second
    return ModelFacts(
        architecture=spec.architecture,
        dtype=dtype,
        sizes=sizes,
        total_parameters=sizes.total,
        active_parameters=sizes.active,
        rule_of_thumb=12 * spec.num_layers * spec.hidden_size**2,
        weight_bytes=sizes.total * itemsize,
        kv_bytes_per_token=kv_bytes,
        windows=windows,
        context=context,
        block_size=block_size,
        block_bytes=block_bytes,
        num_groups=len(groups.windows),
        num_blocks=num_blocks,
        requests=num_blocks // held_blocks(context, groups.windows, block_size, chunk),
        ratio=flops / bytes_per_second,
        compute_bound_rows=read_seconds / (2 * active / flops),
        compute_bound_rows_at_context=read_seconds / (row_seconds - cache_seconds)
        if row_seconds > cache_seconds
        else None,
    )


def _matrices(spec: ModelSpec) -> tuple[int, int]:
    """Weights that a step of many rows reads, and those that one row is multiplied with: layers and head."""
    every, used = feed_forward_matrices(spec.feed_forward, spec.hidden_size)
    head, attention = spec.vocab_size * spec.embedded_width, attention_matrices(spec)
    return spec.num_layers * (attention + every) + head, spec.num_layers * (attention + used) + head
