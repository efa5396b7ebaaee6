"""From logits to tokens: argmax, penalties, temperature, top-k, top-p, min-p, noise, logprobs.

Logits are float32 [rows, vocab]; a GPU reads bfloat16 too, as the float32 that it stands for. Every result depends on
its own row alone, to the bit. The caller's order is: raw logprobs; `add_bias`, `penalize`, `forbid`, `restrict` (in
place); then `sample`, which applies temperature, top-k, top-p and min-p in this order and adds the noise. This is
vLLM's order, but for min-p, which goes last as in transformers.

Sampling is the Gumbel trick: the token with the highest scaled logit + noise is a draw from the softmax. The noise is a
function of (seed, sample index, position, token id) and of nothing else, so neither is the draw.

On a GPU nothing waits for the device, and a call starts the same grids whatever its rows ask for, so it can be captured
in a graph; entries whose row is -1 are then left out by `penalize`, `add_bias` and `forbid`, so that a captured list of
entries may have a fixed length. The fused bodies raise ValueError where shapes, dtypes or strides do not fit.
"""

from types import ModuleType

from torch import Tensor

from kernels.cpu import sampling as cpu
from kernels.ops import choice


def _body(tensor: Tensor) -> ModuleType:
    if not choice.is_fused(tensor):
        return cpu
    from kernels.fused import sampling as fused

    return fused


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit's id per row (int64; the lowest id among equals) and its value (float32).

    The value is not finite where the row holds a NaN or +inf, or nothing but -inf; the id is then one of the vocabulary
    and means nothing, so here and in `sample`.
    """
    return _body(logits).best(logits)


def noise_keys(seeds: Tensor, sample_indices: Tensor, positions: Tensor) -> Tensor:
    """Two 32-bit keys per row, int64 [rows, 2], from the 64 bits of `seeds` (int64, as bits), `sample_indices` and
    `positions` (int64 [rows]). A position is the index, in its sequence, of the token to be sampled."""
    return _body(seeds).noise_keys(seeds, sample_indices, positions)


def noise_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    """32 random bits per row and id, int64 [rows, ids] in [0, 2**32), for `token_ids` int64 [ids]."""
    return _body(keys).noise_bits(keys, token_ids)


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [rows, ids]: -ln(-ln(1 - v)) with v = (noise_bits + 1/2) / 2**32, in float64."""
    return _body(keys).gumbel(keys, token_ids)


def penalize(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Repetition (Keskar et al., 2019), frequency and presence penalties, in place.

    One entry per (row, token id) that occurs in the row's prompt or output, none twice; all arguments but `logits` are
    [entries]. `output_counts` (float32) counts the output only; a positive logit is divided by `repetition`, another
    multiplied; then `frequency` · count and, where the count is not 0, `presence` are taken away (float32).
    """
    _body(logits).penalize(logits, rows, token_ids, output_counts, repetition, presence, frequency)


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    """Adds `bias` (float32 [entries]) in place; no (row, token id) twice."""
    _body(logits).add_bias(logits, rows, token_ids, bias)


def forbid(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Sets the logits of the entries to -inf, in place."""
    _body(logits).forbid(logits, rows, token_ids)


def restrict(logits: Tensor, rows: Tensor, allowed: Tensor) -> None:
    """Sets to -inf, in place, the logits of rows `rows` (int64 [n], none twice) that `allowed` (int32
    [n, ceil(vocab / 32)]) leaves out: bit t % 32 of word t // 32 stands for token t."""
    _body(logits).restrict(logits, rows, allowed)


def keep(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Marks the ids that may be sampled, bool [rows, vocab]; each row's highest logit in `scaled` is 0.

    top-k keeps the k highest (0: all; those equal to the k-th stay); top-p the fewest of these that make up `top_p` of
    their probability, among equals the lowest ids (1: all); min-p those at least `min_p` as likely as the best.
    """
    return _body(scaled).keep(scaled, top_k, top_p, min_p)


def sample(
    logits: Tensor,
    keys: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One id per row (int64), and the row's highest logit as `best` gives it; rows at temperature 0 are greedy.

    `keys` come from `noise_keys`; `temperature`, `top_p`, `min_p` float32 [rows], `top_k` int64 [rows]. The last three
    may all be None where no row filters, which saves a GPU four kernels. Where the value is not finite the id means
    nothing.
    """
    return _body(logits).sample(logits, keys, temperature, top_k, top_p, min_p)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs of `token_ids` (int64 [rows]): (logprob float32 [rows], rank int64 [rows], ids and logprobs of the
    `num_top` most likely, [rows, num_top], best first, among equals the lowest id first).

    A rank is 1 + the number of more likely ids.
    """
    return _body(logits).token_logprobs(logits, token_ids, num_top)
