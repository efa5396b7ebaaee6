"""The one decoder, built from a spec: embed, run the layers, norm, project to logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.ops import choice
from kernels.ops.attention import plan_attention, plan_decode, plan_mixed
from kernels.ops.forms import Products
from services.worker.layers.attention import AttentionStep
from services.worker.layers.linear import Linear
from services.worker.layers.positions import Learned, Places, Turns
from services.worker.models.build import LayerBuilder
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
    exact          as in a StepBatch

    A padding row has context 0, slots below 0, and any token and position that exist; it stands behind all others.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_splits: dict[int | None, int]
    exact: bool


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
    """A batch on the device: what `Decoder.compute` needs, and nothing that it has to wait for. `added` [T,
    hidden_size], if any, goes to the embeddings; `logit_rows` None: all tokens want logits."""

    attention: AttentionStep
    token_ids: Tensor
    added: Tensor | None
    logit_rows: Tensor | None


class Decoder:
    """A loaded model. Not safe for threads: one device thread calls `forward`.

    `by_rows` lets layers keep their weights twice where that makes steps of few rows faster.
    """

    def __init__(
        self, family: Family, weights: WeightSource, dtype: torch.dtype, device: str = "cpu", *, by_rows: bool = True
    ) -> None:
        self.spec: ModelSpec = family.spec
        self.dtype, self.device = dtype, torch.device(device)
        self._windows = group_layers(self.spec.windows).windows
        build = LayerBuilder(family, weights, str(device), by_rows)
        spec, names = self.spec, build.names
        head_name, embedding_name = f"{names.head}.weight", f"{names.base}{names.embedding}.weight"
        head_name = head_name if weights.has(head_name) else embedding_name
        embedding_name = embedding_name if weights.has(embedding_name) else head_name
        self._embedding = build.take(embedding_name)
        self._embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=dtype))
        self._embedding_norm = build.norm(names.base + names.embedding_norm) if spec.embedding_norm else None
        self._project_in = build.plain(names.base + names.project_in) if spec.embedding_width else None
        learned = build.take(f"{names.base}{names.positions}.weight") if isinstance(spec.positions, Learned) else None
        self._places = Places(spec.positions, spec.hidden_size, dtype, device, learned)
        self._layers = [build.layer(layer_id) for layer_id in range(spec.num_layers)]
        self._norm = build.norm(names.base + names.final_norm) if spec.final_norm else None
        self._project_out = build.plain(names.base + names.project_out) if spec.embedding_width else None
        head = self._embedding if head_name == embedding_name else build.take(head_name)
        bias = build.take(f"{names.head}.bias") if spec.head_bias else None
        self._head = Linear(head, bias, by_rows=by_rows or head is self._embedding)
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
    def hidden(self, batch: StepBatch, pool: Tensor) -> Tensor:
        """The same, less the head: [S, hidden_size], which `logits` takes in pieces where all logits are too many."""
        return self._hidden(self.prepare(batch, pool))

    @torch.inference_mode()
    def logits(self, hidden: Tensor, *, exact: bool) -> Tensor:
        """float32 logits [n, vocab_size] of n rows of `hidden`; `exact` as in the batch."""
        return self._head_of(hidden, exact or self.dtype == torch.float32).float()

    @torch.inference_mode()
    def prepare(self, batch: StepBatch, pool: Tensor) -> PreparedStep:
        """Everything that comes from the host, and what all layers share."""
        exact = batch.exact or self.dtype == torch.float32
        logit_rows = batch.logit_rows.to(self.device, non_blocking=True)
        positions, end = self._per_token(batch.positions, exact), max(batch.context_lens)
        step = self._plan(batch, pool, self._places.turns(positions, end), exact)
        added = self._places.rows(positions, end)
        return PreparedStep(step, self._per_token(batch.token_ids, exact), added, logit_rows)

    @torch.inference_mode()
    def compute(self, prepared: PreparedStep) -> Tensor:
        """The forward itself: on a GPU it only launches kernels, so a CUDA graph can hold it."""
        return self._logits(prepared).float()

    def _logits(self, prepared: PreparedStep) -> Tensor:
        """[S, vocab_size], in the decoder's dtype or wider."""
        return self._head_of(self._hidden(prepared), prepared.attention.exact)

    def _hidden(self, prepared: PreparedStep) -> Tensor:
        """[S, hidden_size] behind the last layer."""
        step, exact = prepared.attention, prepared.attention.exact
        hidden = self._embedded(prepared, exact)
        for layer in self._layers[:-1]:
            hidden = layer.forward(hidden, step)
            self.layers_done += 1
        return self._layers[-1].forward(hidden, step, prepared.logit_rows)

    def _head_of(self, hidden: Tensor, exact: bool) -> Tensor:
        if hidden.shape[0] == 0:
            return hidden.new_empty((0, self.spec.vocab_size))
        if self._norm is not None:
            hidden = self._norm(hidden, exact=exact)
        if self._project_out is not None:
            hidden = self._project_out(hidden, exact=exact)
        return self._rescaled(self._head(hidden, exact=exact))

    def _embedded(self, prepared: PreparedStep, exact: bool) -> Tensor:
        hidden = self._embedding.index_select(0, prepared.token_ids)
        if self._embedding_scale != 1:
            hidden = hidden * self._embedding_scale
        if self._project_in is not None:
            hidden = self._project_in(hidden, exact=exact)
        if prepared.added is not None:
            hidden = hidden + prepared.added
        return hidden if self._embedding_norm is None else self._embedding_norm(hidden, exact=exact)

    def _rescaled(self, logits: Tensor) -> Tensor:
        scale, cap = self.spec.logit_scale, self.spec.logit_soft_cap
        if scale == 1 and cap == 0:
            return logits
        logits = logits.float() * scale
        return torch.tanh(logits / cap) * cap if cap > 0 else logits

    def products(self) -> Products:
        """Each of its products once, by operation and shape: one layer stands for all."""
        projections = [each.packed for each in (self._project_in, self._project_out) if each is not None]
        return [
            *self._layers[0].products(),
            *(("linear", packed) for packed in projections),
            ("linear", self._head.packed),
        ]

    @property
    def num_groups(self) -> int:
        """Cache groups: block tables per row."""
        return len(self._windows)

    def reserve(self, max_model_len: int) -> None:
        """Before anything is captured: whatever would grow with a context."""
        self._places.reserve(max_model_len)

    @torch.inference_mode()
    def decode(self, rows: DecodeRows, pool: Tensor, out: Tensor) -> None:
        """Writes the float32 logits of all rows to `out` [R, vocab_size]; what it launches depends on R alone.

        Unless they are exact, a row's logits may differ in their last bits from those of `forward`.
        """
        plans = tuple(
            plan_decode(
                pool,
                rows.context_lens,
                rows.block_tables[group],
                rows.slots[group],
                num_heads=self.spec.num_heads,
                max_splits=rows.max_splits[window],
                window=window,
                exact=rows.exact,
            )
            for group, window in enumerate(self._windows)
        )
        step = AttentionStep(pool, plans, self._places.turns(rows.positions, 0), rows.exact)
        out.copy_(self._logits(PreparedStep(step, rows.token_ids, self._places.rows(rows.positions, 0), None)))

    @torch.inference_mode()
    def compute_mixed(self, rows: MixedRows, pool: Tensor, out: Tensor) -> None:
        """The same of a step with prompt tokens: the logits of `logit_rows` to `out` [S, vocab_size]."""
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
        step = AttentionStep(pool, plans, self._places.turns(rows.positions, 0), exact=False)
        added = self._places.rows(rows.positions, 0)
        out.copy_(self._logits(PreparedStep(step, rows.token_ids, added, rows.logit_rows)))

    def _plan(self, batch: StepBatch, pool: Tensor, turns: Turns, exact: bool) -> AttentionStep:
        starts, contexts = list(batch.query_starts), list(batch.context_lens)
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
        return AttentionStep(pool, plans, turns, exact)

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
    max_model_len: int = 0,
) -> Decoder:
    """Build the decoder of an opened checkpoint, for contexts of up to `max_model_len` tokens (0: what its spec says).

    Raises CheckpointError naming file and tensor or setting.
    """
    family = translate(checkpoint.config).serving(max_model_len)
    with CheckpointWeights(checkpoint, family, dtype, progress, device) as weights:
        return Decoder(family, weights, dtype, device, by_rows=by_rows)


def random_decoder(
    config: dict[str, Any],
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
    scale: float = 0.02,
    max_model_len: int = 0,
) -> Decoder:
    """The decoder of a config.json with random weights of standard deviation `scale`, the same for the same seed on one
    kind of device."""
    family = translate(config).serving(max_model_len)
    return Decoder(family, RandomWeights(family, dtype, seed, scale, device), dtype, device)
