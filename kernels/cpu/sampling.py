"""Sampling on a CPU: NumPy where it beats torch, row by row where only some rows ask. kernels.ops.sampling has the
contracts; bits equal kernels.reference.sampling except for the last digit of logprobs and the rounding of probability
masses at the very edge of a nucleus.

Every result depends on its own row alone, to the bit: reductions run over one row at a time, and the rest is single
correctly rounded operations. numpy.log and numpy.exp give a value the same bits at any offset (tests say so).

Measured, 16 × 32,000 on two cores: numpy.argmax 0.04 ms, torch.argmax 0.45 (and torch.max 0.41).
"""

import functools

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray

MASK_32 = np.uint32(0xFFFFFFFF)
GOLDEN = np.uint32(0x9E3779B9)
FIRST_KEY = 0x243F6A88
SECOND_KEY = 0x85A308D3
FIRST_FACTOR = np.uint32(0x7FEB352D)
SECOND_FACTOR = np.uint32(0x846CA68B)

CHUNK_ELEMENTS = 2**19
"""Of noise bounds at once, so that intermediates stay in the cache."""
LN_2 = float(np.log(2.0))
BOUND_SLACK = 1e-3
"""Covers the roundings of a bound: of bits to float32 (1e-5), of the last mixing step that it leaves out (3e-5)."""


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    x = _array(logits)
    token_ids = x.argmax(axis=-1)
    return torch.from_numpy(token_ids), torch.from_numpy(_at(x, token_ids))


def noise_keys(seeds: Tensor, sample_indices: Tensor, positions: Tensor) -> Tensor:
    seed_words = seeds.numpy().view(np.uint64)
    low, high = seed_words.astype(np.uint32), (seed_words >> np.uint64(32)).astype(np.uint32)
    words = (low, high, sample_indices.numpy().astype(np.uint32), positions.numpy().astype(np.uint32))
    keys = np.empty((len(seed_words), 2), np.int64)
    for column, start in enumerate((FIRST_KEY, SECOND_KEY)):
        state = np.full(len(seed_words), start, np.uint32)
        for word in words:
            state = _mix((state + GOLDEN) ^ word)
        keys[:, column] = state
    return torch.from_numpy(keys)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> np.uint32(16))) * FIRST_FACTOR
    x = (x ^ (x >> np.uint32(15))) * SECOND_FACTOR
    return x ^ (x >> np.uint32(16))


def noise_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    return torch.from_numpy(_noise_bits(_key_words(keys)[:, :, None], token_ids.numpy()).astype(np.int64))


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    return torch.from_numpy(_gumbel(_key_words(keys)[:, :, None], token_ids.numpy()))


def _key_words(keys: Tensor) -> Array:
    return keys.numpy().astype(np.uint32)


def _noise_bits(keys: Array, token_ids: Array) -> Array:
    """`keys` uint32 [rows, 2, 1] or [entries, 2]; `token_ids` broadcasts against keys[:, 0]."""
    x = _mix(token_ids.astype(np.uint32)) ^ keys[:, 0]
    x = (x ^ (x >> np.uint32(16))) * FIRST_FACTOR + keys[:, 1]
    x = (x ^ (x >> np.uint32(15))) * SECOND_FACTOR
    return x ^ (x >> np.uint32(16))


def _gumbel(keys: Array, token_ids: Array) -> Array:
    uniform = (_noise_bits(keys, token_ids).astype(np.float64) + 0.5) / 2**32
    return (-np.log(-np.log1p(-uniform))).astype(np.float32)


def penalize(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    view, at = _array(logits), (rows.numpy(), token_ids.numpy())
    counts, factor = output_counts.numpy(), repetition.numpy()
    x = view[at]
    x = np.where(x > 0, x / factor, x * factor)
    x -= frequency.numpy() * counts
    x -= presence.numpy() * (counts > 0)
    view[at] = x


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    _array(logits)[rows.numpy(), token_ids.numpy()] += bias.numpy()


def forbid(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    _array(logits)[rows.numpy(), token_ids.numpy()] = -np.inf


def keep(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    kept = torch.zeros(scaled.shape, dtype=torch.bool)
    for row in range(len(scaled)):
        kept[
            row, torch.from_numpy(_kept(_array(scaled[row]), int(top_k[row]), float(top_p[row]), float(min_p[row])))
        ] = True
    return kept


def sample(
    logits: Tensor, keys: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    x = _array(logits)
    token_ids = x.argmax(axis=-1)
    values = _at(x, token_ids)
    warm, k, p, floor = (each.numpy() for each in (temperature, top_k, top_p, min_p))
    sampling = (warm > 0) & np.isfinite(values)  # a broken row shows in its value, and is for the caller
    filtered = sampling & ((k > 0) | (p < 1) | (floor > 0))
    key_words = _key_words(keys)
    for row in np.flatnonzero(filtered):
        scaled = (x[row] - values[row]) / warm[row]
        candidates = _kept(scaled, int(k[row]), float(p[row]), float(floor[row]))
        scores = scaled[candidates] + _gumbel(key_words[row : row + 1, :, None], candidates)[0]
        token_ids[row] = candidates[scores.argmax()]
    whole = np.flatnonzero(sampling & ~filtered)
    step = max(1, CHUNK_ELEMENTS // x.shape[-1])
    for start in range(0, len(whole), step):
        rows = whole[start : start + step]
        token_ids[rows] = _sample_whole(x[rows], values[rows], warm[rows], key_words[rows])
    return torch.from_numpy(token_ids), torch.from_numpy(values)


def _kept(scaled: Array, top_k: int, top_p: float, min_p: float) -> Array:
    """The ids that top-k, top-p and min-p leave, ascending. `scaled` float32 [vocab], its maximum 0."""
    if 0 < top_k < len(scaled):
        kth_value = np.partition(scaled, len(scaled) - top_k)[-top_k]
        candidates = np.flatnonzero(scaled >= kth_value)
    else:
        candidates = np.arange(len(scaled))
    mass = np.exp(scaled[candidates].astype(np.float64))
    kept = mass >= min_p
    if top_p < 1:
        kept &= _nucleus(mass, top_p)
    return candidates[kept]


def _nucleus(mass: Array, top_p: float) -> Array:
    """Marks the fewest largest masses that make up `top_p` of the sum; among equals the first go in first.

    Masses below (1 - top_p) / n of the sum cannot belong to it, so only the others are sorted.
    """
    goal = top_p * mass.sum()
    eligible = np.flatnonzero(mass >= 0.5 * (mass.sum() - goal) / len(mass))
    order = eligible[np.argsort(-mass[eligible], kind="stable")]
    sorted_mass = mass[order]
    before = sorted_mass.cumsum() - sorted_mass
    marked = np.zeros(len(mass), np.bool_)
    marked[order[: max(1, np.count_nonzero(before < goal))]] = True
    return marked


def _sample_whole(logits: Array, values: Array, temperature: Array, keys: Array) -> Array:
    """argmax of scaled logit plus Gumbel noise over the whole vocabulary, exactly, by bounds.

    Since -ln(1 - v) >= v, noise is at most -ln v, and log2 v is at least what v's bits as a float32 say when read as
    an integer. So a few integer operations bound every token's score; the exact noise, two logarithms in float64, is
    computed for the few tokens whose bound reaches the exact score of the one with the highest bound.
    """
    scaled = (logits - values[:, None]) / temperature[:, None]
    bounds = _score_bounds(scaled, keys)
    leaders = bounds.argmax(axis=-1)
    leading = _at(scaled, leaders) + _gumbel(keys, leaders)
    slack = BOUND_SLACK + 1e-6 * np.abs(leading)
    rows, candidates = np.nonzero(bounds >= (leading - slack)[:, None])
    scores = scaled[rows, candidates] + _gumbel(keys[rows], candidates)
    order = np.lexsort((candidates, -scores, rows))
    firsts = np.flatnonzero(np.diff(rows, prepend=-1))
    leaders[rows[firsts]] = candidates[order[firsts]]
    return leaders


def _score_bounds(scaled: Array, keys: Array) -> Array:
    """An upper bound of scaled + noise, float32 [rows, vocab], up to BOUND_SLACK."""
    signed = torch.from_numpy(keys.view(np.int32))
    x = torch.bitwise_xor(_mixed_ids(scaled.shape[-1]), signed[:, :1])
    shifted = torch.bitwise_right_shift(x, 16).bitwise_and_(0xFFFF)
    x.bitwise_xor_(shifted).mul_(FIRST_FACTOR.view(np.int32).item()).add_(signed[:, 1:])
    torch.bitwise_right_shift(x, 15, out=shifted).bitwise_and_(0x1FFFF)
    x.bitwise_xor_(shifted).mul_(SECOND_FACTOR.view(np.int32).item())
    # The last `x ^ (x >> 16)` moves x by less than 2**-15 of itself.
    uniform = x.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF).float()
    log_2 = uniform.view(torch.int32).float()  # (log2 v + 158) * 2**23, or less
    bound = torch.from_numpy(scaled).add(log_2, alpha=-LN_2 * 2**-23).add_((127 + 31) * LN_2)
    return bound.numpy()


@functools.lru_cache(maxsize=4)
def _mixed_ids(vocab_size: int) -> Tensor:
    return torch.from_numpy(_mix(np.arange(vocab_size, dtype=np.uint32)).view(np.int32))


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _array(logits)
    highest = x.max(axis=-1)
    log_sums = np.log(np.exp(x - highest[:, None]).sum(axis=-1)) + highest
    values = _at(x, token_ids.numpy())
    ranks = 1 + np.count_nonzero(x > values[:, None], axis=-1)
    top_ids = _top_ids(x, num_top)
    top_logprobs = np.take_along_axis(x, top_ids, axis=-1) - log_sums[:, None]
    arrays = (values - log_sums, ranks, top_ids, top_logprobs)
    return tuple(torch.from_numpy(each) for each in arrays)  # type: ignore[return-value]


def _top_ids(x: Array, num_top: int) -> Array:
    """The ids of the highest logits, best first, among equals the lowest first; int64 [rows, num_top]."""
    top_ids = np.empty((len(x), num_top), np.int64)
    for row, logits in enumerate(x if num_top else ()):
        kth_value = np.partition(logits, len(logits) - num_top)[-num_top]
        candidates = np.flatnonzero(logits >= kth_value)
        top_ids[row] = candidates[np.argsort(-logits[candidates], kind="stable")[:num_top]]
    return top_ids


def _array(logits: Tensor) -> Array:
    return logits.numpy()


def _at(x: Array, token_ids: Array) -> Array:
    return x[np.arange(len(x)), token_ids]
