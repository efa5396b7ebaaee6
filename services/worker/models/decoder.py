"""The one decoder, built from a spec: embed, for each layer attend and feed forward, norm, project to logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.ops import choice
from kernels.ops.attention import plan_attention, plan_decode, plan_mixed
from kernels.ops.forms import Products
from services.worker.layers.attention import Attention, AttentionStep
from services.worker.layers.linear import GatedLinear, Linear
from services.worker.layers.mlp import GatedMlp
from services.worker.layers.norm import RmsNorm
from services.worker.layers.positions import RopeTable
from services.worker.models.registry import translate
from services.worker.models.spec import Family, ModelSpec
from services.worker.models.weights import CheckpointWeights, Progress, RandomWeights, WeightSource
from shared.cache_groups import group_layers
from shared.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's tokens, T of them in R rows; built once, used by all layers, changed by none.

    token_ids      [T] int64
    positions      [T] int64, absolute
    slots          [G, T] int64, block_id * block_size + offset: where K and V of each token go, in each cache group
    query_starts   R + 1 numbers: row r owns tokens query_starts[r]:query_starts[r + 1], in order of position
    context_lens   R numbers: tokens of the row in the cache after this step's write; the row's last token sits at
                   position context_lens[r] - 1
    block_tables   [G, R, max_blocks] int32; entries beyond a row's context are never read, and what the blocks before
                   a group's window hold has no influence
    logit_rows     [S] int64: which of the T tokens want logits; may be empty
    exact          a token's logits then have the same bits whatever it shares its steps with
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Tensor
    logit_rows: Tensor
    exact: bool


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One token of each of R rows, every number in its place on the device, so that a CUDA graph can hold the step.

    token_ids      [R] int64
    positions      [R] int64, absolute; slots [G, R] int64 as in a StepBatch
    context_lens   [R] int32
    block_tables   [G, R, max_blocks] int32
    max_splits     by window: the room for attention's work, see kernels.ops.attention.plan_decode

    A padding row has context 0, slots below 0, and any token and position that exist.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_splits: dict[int | None, int]


@dataclass(frozen=True, slots=True)
class MixedRows:
    """The same of a step of T tokens in R rows, some of them chunks of prompts.

    token_ids, positions          [T] int64; slots [G, T] int64 as in DecodeRows
    query_starts                  [R + 1] int32; context_lens [R] int32; block_tables [G, R, max_blocks] int32
    tiles, decode_rows            int32 [n, 2] and [m], see kernels.ops.attention.plan_mixed
    logit_rows                    [S] int64: which tokens want logits

    The last row is padding, and the last token belongs to no row.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    tiles: Tensor
    decode_rows: Tensor
    logit_rows: Tensor
    max_splits: dict[int | None, int]


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A batch on the device: what `Decoder.compute` needs, and nothing that it has to wait for. `logit_rows` None: all
    tokens want logits."""

    attention: AttentionStep
    token_ids: Tensor
    logit_rows: Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One pre-norm block."""

    attention_norm: RmsNorm
    attention: Attention
    mlp_norm: RmsNorm
    mlp: GatedMlp

    def forward(self, hidden: Tensor, step: AttentionStep, wanted: Tensor | None = None) -> Tensor:
        """`wanted` [S]: of these tokens only; behind the last layer nobody needs the others."""
        hidden = self.attention.add(self.attention_norm(hidden, exact=step.exact), hidden, step, wanted)
        if hidden.shape[0] == 0:
            return hidden
        return self.mlp.add(self.mlp_norm(hidden, exact=step.exact), hidden, exact=step.exact)


class Decoder:
    """A loaded model. Not safe for threads: one device thread calls `forward`.

    `by_rows` lets layers keep their weights twice where that makes steps of few rows faster.
    """

    def __init__(
        self, family: Family, weights: WeightSource, dtype: torch.dtype, device: str = "cpu", *, by_rows: bool = True
    ) -> None:
        self.spec: ModelSpec = family.spec
        self.dtype, self.device = dtype, torch.device(device)
        groups = group_layers(self.spec.windows)
        self._windows = groups.windows
        names = family.names
        head_name = names.head if weights.has(names.head) else names.embedding
        embedding_name = names.embedding if weights.has(names.embedding) else names.head
        self._embedding = weights.take(embedding_name).to(device)
        self._layers = [
            _build_layer(family, layer_id, groups.places[layer_id], weights, device, by_rows)
            for layer_id in range(self.spec.num_layers)
        ]
        self._norm = RmsNorm(weights.take(names.final_norm).to(device), self.spec.norm_eps)
        head = self._embedding if head_name == embedding_name else weights.take(head_name).to(device)
        self._head = Linear(head, by_rows=by_rows or head is self._embedding)
        self._rope = RopeTable(self.spec.rope, self.spec.head_dim, dtype, device)
        self.layers_done = 0
        """Over all forwards: tells a slow step from a stuck one."""
        self._pairs_lone_rows = not choice.is_fused(self._embedding)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, pool: Tensor) -> Tensor:
        """float32 logits [S, vocab_size] of `logit_rows`, after writing K and V of all tokens into `pool`.

        `pool` is [num_blocks, layers of a cache group, 2, num_kv_heads, block_size, head_dim] in this decoder's dtype
        and changes in the batch's slots only. Every layer writes all rows before any row reads. The batch may lie on
        the host.
        """
        return self.compute(self.prepare(batch, pool))

    @torch.inference_mode()
    def prepare(self, batch: StepBatch, pool: Tensor) -> PreparedStep:
        """Everything that comes from the host, and what all layers share."""
        exact = batch.exact or self.dtype == torch.float32
        logit_rows = batch.logit_rows.to(self.device, non_blocking=True)
        return PreparedStep(self._plan(batch, pool, exact), self._per_token(batch.token_ids, exact), logit_rows)

    @torch.inference_mode()
    def compute(self, prepared: PreparedStep) -> Tensor:
        """The forward itself: on a GPU it only launches kernels, so a CUDA graph can hold it."""
        return self._logits(prepared).float()

    def _logits(self, prepared: PreparedStep) -> Tensor:
        """In the decoder's dtype, [S, vocab_size]."""
        step, exact = prepared.attention, prepared.attention.exact
        hidden = self._embedding.index_select(0, prepared.token_ids)
        for layer in self._layers[:-1]:
            hidden = layer.forward(hidden, step)
            self.layers_done += 1
        hidden = self._layers[-1].forward(hidden, step, prepared.logit_rows)
        if hidden.shape[0] == 0:
            return hidden.new_empty((0, self.spec.vocab_size))
        return self._head(self._norm(hidden, exact=exact), exact=exact)

    def products(self) -> Products:
        """Each of its products once, by operation and shape: one layer stands for all."""
        layer = self._layers[0]
        return [
            ("linear", layer.attention.qkv.packed),
            ("linear_add", layer.attention.out.packed),
            ("gated_linear", layer.mlp.gate_up.packed),
            ("linear_add", layer.mlp.down.packed),
            ("linear", self._head.packed),
        ]

    @property
    def num_groups(self) -> int:
        """Cache groups: block tables per row."""
        return len(self._windows)

    def reserve(self, max_model_len: int) -> None:
        """Before anything is captured: whatever would grow with a context."""
        self._rope.reserve(max_model_len)

    @torch.inference_mode()
    def decode(self, rows: DecodeRows, pool: Tensor, out: Tensor) -> None:
        """Writes the float32 logits of all rows to `out` [R, vocab_size]; what it launches depends on R alone.

        A row's logits may differ in their last bits from those of `forward`: not for exact steps.
        """
        cos, sin = self._rope.gather(rows.positions, 0)
        plans = tuple(
            plan_decode(
                pool,
                rows.context_lens,
                rows.block_tables[group],
                rows.slots[group],
                num_heads=self.spec.num_heads,
                max_splits=rows.max_splits[window],
                window=window,
            )
            for group, window in enumerate(self._windows)
        )
        step = AttentionStep(pool, plans, cos, sin, exact=False)
        out.copy_(self._logits(PreparedStep(step, rows.token_ids, None)))

    @torch.inference_mode()
    def compute_mixed(self, rows: MixedRows, pool: Tensor, out: Tensor) -> None:
        """The same of a step with prompt tokens: the logits of `logit_rows` to `out` [S, vocab_size]."""
        cos, sin = self._rope.gather(rows.positions, 0)
        plans = tuple(
            plan_mixed(
                pool,
                rows.query_starts,
                rows.context_lens,
                rows.block_tables[group],
                rows.slots[group],
                rows.tiles,
                rows.decode_rows,
                num_heads=self.spec.num_heads,
                max_splits=rows.max_splits[window],
                window=window,
            )
            for group, window in enumerate(self._windows)
        )
        step = AttentionStep(pool, plans, cos, sin, exact=False)
        out.copy_(self._logits(PreparedStep(step, rows.token_ids, rows.logit_rows)))

    def _plan(self, batch: StepBatch, pool: Tensor, exact: bool) -> AttentionStep:
        starts, contexts = list(batch.query_starts), list(batch.context_lens)
        cos, sin = self._rope.gather(self._per_token(batch.positions, exact), max(contexts))
        plans = tuple(
            plan_attention(
                pool,
                starts,
                contexts,
                batch.block_tables[group],
                batch.slots[group],
                num_heads=self.spec.num_heads,
                window=window,
                exact=exact,
            )
            for group, window in enumerate(self._windows)
        )
        return AttentionStep(pool, plans, cos, sin, exact)

    def _per_token(self, values: Tensor, exact: bool) -> Tensor:
        """On the device. On a CPU a lone token of an exact step gets a twin: oneDNN multiplies one row unlike two."""
        if exact and values.shape[0] == 1 and self._pairs_lone_rows:
            return values.repeat(2)
        return values.to(self.device, non_blocking=True)


def load_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: str = "cpu",
    progress: Progress | None = None,
    *,
    by_rows: bool = True,
) -> Decoder:
    """Build the decoder of an opened checkpoint; raises CheckpointError naming file and tensor or setting."""
    family = translate(checkpoint.config)
    with CheckpointWeights(checkpoint, family, dtype, progress) as weights:
        return Decoder(family, weights, dtype, device, by_rows=by_rows)


def random_decoder(
    config: dict[str, Any], dtype: torch.dtype, seed: int = 0, device: str = "cpu", scale: float = 0.02
) -> Decoder:
    """The decoder of a config.json with random weights of standard deviation `scale`, the same for the same seed on one
    kind of device."""
    family = translate(config)
    return Decoder(family, RandomWeights(family, dtype, seed, scale, device), dtype, device)


def _build_layer(
    family: Family, layer_id: int, place: tuple[int, int], weights: WeightSource, device: str, by_rows: bool
) -> DecoderLayer:
    spec, names = family.spec, family.names.layer_names
    prefix = family.names.layer.format(layer_id)

    def norm(name: str) -> RmsNorm:
        return RmsNorm(weights.take(f"{prefix}{name}.weight").to(device), spec.norm_eps)

    def merged(*parts: str, biased: bool) -> tuple[Tensor, Tensor | None]:
        weight = weights.take(*(f"{prefix}{part}.weight" for part in parts)).to(device)
        bias = weights.take(*(f"{prefix}{part}.bias" for part in parts)).to(device) if biased else None
        return weight, bias

    attention = Attention(
        place,
        spec.heads,
        Linear(*merged(names.query, names.key, names.value, biased=spec.qkv_bias), by_rows=by_rows),
        Linear(*merged(names.out, biased=spec.out_bias), by_rows=by_rows),
        q_norm=norm(names.query_norm) if spec.qk_norm else None,
        k_norm=norm(names.key_norm) if spec.qk_norm else None,
    )
    mlp = GatedMlp(
        GatedLinear(*merged(names.gate, names.up, biased=spec.mlp_bias), by_rows=by_rows),
        Linear(*merged(names.down, biased=spec.mlp_bias), by_rows=by_rows),
    )
    return DecoderLayer(norm(names.attention_norm), attention, norm(names.mlp_norm), mlp)
