"""Sampling on a CPU, in NumPy: one thread, a few rows at a time. kernels.ops.sampling has the contracts; bits equal
kernels.reference.sampling but for the last digits of logprobs and of probability masses at the very edge of a nucleus.

Every result depends on its own row alone, to the bit: reductions run over one row at a time, and the rest is single
correctly rounded operations. numpy.log and numpy.exp give a value the same bits at any offset (tests say so).

Measured at 32,000 ids: an integer operation on a row takes 3 µs, numpy.argmax 2, torch.argmax 28. Parallel torch is no
faster where it matters: beside a busy neighbour each of its operations took 4 ms (16 rows), the barrier's wait.
"""

import functools

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray

GOLDEN = np.uint32(0x9E3779B9)
FIRST_KEY = 0x243F6A88
SECOND_KEY = 0x85A308D3
FIRST_FACTOR = np.uint32(0x7FEB352D)
SECOND_FACTOR = np.uint32(0x846CA68B)

CHUNK_ELEMENTS = 2**16
"""Worked on at once, so that intermediates stay in a core's own cache."""
LN_2 = float(np.log(2.0))
BOUND_SLACK = 1e-3
"""Covers the roundings of a bound: of bits to float32 (1e-5), of the last mixing step that it leaves out (3e-5)."""
NUM_GROUPED = 64
"""Logits per group whose maxima bound the k-th highest logit from below."""
SORTED_AT_ONCE = 2048
NUM_BINS = 512
BINS_PER_NAT = 16.0


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


def restrict(logits: Tensor, rows: Tensor, allowed: Tensor) -> None:
    view, octets = _array(logits), allowed.numpy().astype("<i4", copy=False).view(np.uint8)
    for row, bits in zip(rows.tolist(), octets, strict=True):
        bound = _bounds_by_octet().take(bits, axis=0).reshape(-1)[: view.shape[1]]
        np.fmin(view[row], bound, out=view[row])


@functools.cache
def _bounds_by_octet() -> Array:
    """float32 [256, 8]: -inf for the bits that are 0, the lowest first, else NaN, which numpy.fmin leaves out.

    8 rows of 32,000 ids take .17 ms this way, and .4 to .9 with numpy.unpackbits and an index."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits == 1, np.float32(np.nan), np.float32(-np.inf))


def keep(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    kept = torch.zeros(scaled.shape, dtype=torch.bool)
    for row in range(len(scaled)):
        kept[
            row, torch.from_numpy(_kept(_array(scaled[row]), int(top_k[row]), float(top_p[row]), float(min_p[row])))
        ] = True
    return kept


def sample(
    logits: Tensor,
    keys: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x = _array(logits)
    token_ids = x.argmax(axis=-1)
    values = _at(x, token_ids)
    warm, k, p, floor = (
        np.full(len(x), nothing) if each is None else each.numpy()
        for each, nothing in ((temperature, 1.0), (top_k, 0), (top_p, 1.0), (min_p, 0.0))
    )
    sampling = (warm > 0) & np.isfinite(values)  # a broken row shows in its value, and is for the caller
    filtered = sampling & ((k > 0) | (p < 1) | (floor > 0))
    key_words = _key_words(keys)
    for row in np.flatnonzero(filtered):
        scaled = (x[row] - values[row]) / warm[row]
        candidates = _kept(scaled, int(k[row]), float(p[row]), float(floor[row]))
        token_ids[row] = _draw_among(scaled, candidates, key_words[row : row + 1])
    whole = np.flatnonzero(sampling & ~filtered)
    step = max(1, CHUNK_ELEMENTS // x.shape[-1])
    for start in range(0, len(whole), step):
        rows = whole[start : start + step]
        scaled = x[rows] - values[rows, None]
        scaled /= warm[rows, None]
        token_ids[rows] = _draw(scaled, key_words[rows])
    return torch.from_numpy(token_ids), torch.from_numpy(values)


def _kept(scaled: Array, top_k: int, top_p: float, min_p: float) -> Array:
    """The ids that top-k, top-p and min-p leave, ascending. `scaled` float32 [vocab], its maximum 0."""
    if 0 < top_k < len(scaled):
        candidates = _highest(scaled, top_k)
    else:
        candidates = np.arange(len(scaled))
    if top_p >= 1 and min_p <= 0:
        return candidates
    chosen = scaled[candidates]
    mass = np.exp(chosen.astype(np.float64))
    kept = mass >= min_p
    if top_p < 1:
        kept &= _nucleus(chosen, mass, top_p)
    return candidates[kept]


def _highest(x: Array, k: int) -> Array:
    """The ids of the k highest values, ascending, and of all equal to the k-th.

    The k-th highest of the maxima of disjoint groups is a lower bound that few values reach; they are then looked at
    closely. 20 of 32,000 in 25 µs, where numpy.partition takes 141.
    """
    num_groups = len(x) // NUM_GROUPED
    if k <= num_groups // 2:
        maxima = x[: num_groups * NUM_GROUPED].reshape(NUM_GROUPED, num_groups).max(axis=0)
        candidates = np.flatnonzero(x >= _kth(maxima, k))
        values = x[candidates]
        return candidates[values >= _kth(values, k)]
    return np.flatnonzero(x >= _kth(x, k))


def _kth(values: Array, k: int) -> np.floating:
    return np.partition(values, len(values) - k)[-k]


def _nucleus(scaled: Array, mass: Array, top_p: float) -> Array:
    """Marks the fewest largest masses that make up `top_p` of the sum; among equals the first go in first.

    Many values are first counted by bins, so that only those of the bin where the sum is reached are sorted.
    """
    goal = top_p * mass.sum()
    if len(mass) <= SORTED_AT_ONCE:
        marked, undecided = np.zeros(len(mass), np.bool_), np.arange(len(mass))
    else:
        bins = np.minimum(scaled * np.float32(-BINS_PER_NAT), NUM_BINS - 1).astype(np.int32)
        below = np.bincount(bins, weights=mass, minlength=NUM_BINS).cumsum()
        critical = min(int(np.searchsorted(below, goal)), NUM_BINS - 1)
        marked, undecided = bins < critical, np.flatnonzero(bins == critical)
        goal -= below[critical - 1] if critical else 0
    order = undecided[np.argsort(-mass[undecided], kind="stable")]
    sorted_mass = mass[order]
    before = sorted_mass.cumsum() - sorted_mass
    marked[order[: max(1, np.count_nonzero(before < goal))]] = True
    return marked


def _draw_among(scaled: Array, candidates: Array, keys: Array) -> int:
    """The draw from one row's `candidates`."""
    if len(candidates) > SORTED_AT_ONCE:
        alone = np.full((1, len(scaled)), -np.inf, np.float32)
        alone[0, candidates] = scaled[candidates]
        return int(_draw(alone, keys)[0])
    scores = scaled[candidates] + _gumbel(keys[:, :, None], candidates)[0]
    return int(candidates[scores.argmax()])


def _draw(scaled: Array, keys: Array) -> Array:
    """argmax of `scaled` [rows, vocab] plus Gumbel noise over the whole vocabulary, exactly, by bounds.

    Since -ln(1 - v) >= v, noise is at most -ln v, and log2 v is at least what v's bits as a float32 say when read as
    an integer. So a few integer operations bound every token's score; the exact noise, two logarithms in float64, is
    computed for the few tokens whose bound reaches the exact score of the one with the highest bound.
    """
    bounds = _score_bounds(scaled, keys)
    leaders = bounds.argmax(axis=-1)
    leading = _at(scaled, leaders) + _gumbel(keys, leaders)
    threshold = leading - (BOUND_SLACK + 1e-6 * np.abs(leading))
    rows, candidates = np.divmod(np.flatnonzero(bounds >= threshold[:, None]), bounds.shape[-1])
    scores = scaled[rows, candidates] + _gumbel(keys[rows], candidates)
    order = np.lexsort((candidates, -scores, rows))
    firsts = np.flatnonzero(np.diff(rows, prepend=-1))
    leaders[rows[firsts]] = candidates[order[firsts]]
    return leaders


def _score_bounds(scaled: Array, keys: Array) -> Array:
    """An upper bound of scaled + noise, float32 [rows, vocab], up to BOUND_SLACK."""
    x = np.bitwise_xor(_mixed_ids(scaled.shape[-1]), keys[:, :1])
    shifted = np.right_shift(x, np.uint32(16))
    x ^= shifted
    x *= FIRST_FACTOR
    x += keys[:, 1:]
    np.right_shift(x, np.uint32(15), out=shifted)
    x ^= shifted
    x *= SECOND_FACTOR
    x >>= np.uint32(1)  # without the last `x ^ (x >> 16)`, which moves x by less than 2**-15 of itself
    bound = shifted.view(np.float32)
    np.copyto(bound, x.view(np.int32), casting="unsafe")
    log_2 = x.view(np.float32)
    np.copyto(log_2, bound.view(np.int32), casting="unsafe")  # (log2 v + 158) * 2**23, or less
    np.multiply(log_2, np.float32(-LN_2 * 2**-23), out=bound)
    bound += np.float32((127 + 31) * LN_2)
    bound += scaled
    return bound


@functools.lru_cache(maxsize=4)
def _mixed_ids(vocab_size: int) -> Array:
    return _mix(np.arange(vocab_size, dtype=np.uint32))


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = _array(logits)
    values = _at(x, token_ids.numpy())
    logprobs, ranks = np.empty_like(values), np.empty(len(x), np.int64)
    top_ids, top_logprobs = np.empty((len(x), num_top), np.int64), np.empty((len(x), num_top), np.float32)
    for row, row_logits in enumerate(x):
        log_sum = _log_sum(row_logits)
        logprobs[row] = values[row] - log_sum
        ranks[row] = 1 + np.count_nonzero(row_logits > values[row])
        if num_top:
            candidates = _highest(row_logits, num_top)
            order = np.argsort(-row_logits[candidates], kind="stable")[:num_top]
            top_ids[row] = candidates[order]
            top_logprobs[row] = row_logits[top_ids[row]] - log_sum
    from_numpy = torch.from_numpy
    return from_numpy(logprobs), from_numpy(ranks), from_numpy(top_ids), from_numpy(top_logprobs)


def _log_sum(logits: Array) -> np.float32:
    highest = logits.max()
    shifted = logits - highest
    return highest + np.log(np.exp(shifted, out=shifted).sum())


def _array(logits: Tensor) -> Array:
    return logits.numpy()


def _at(x: Array, token_ids: Array) -> Array:
    return x[np.arange(len(x)), token_ids]
