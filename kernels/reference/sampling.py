"""From logits to tokens, written to be read. kernels.ops.sampling has the contracts.

The noise is counter-based: 32 bits that are a function of (seed, sample index, position, token id) alone, from 32-bit
additions, exclusive ors, shifts and multiplications, here in int64 with a mask and in Triton in uint32. The mixing step
is `lowbias32` of Chris Wellons' hash-prospector (public domain, github.com/skeeto/hash-prospector; bias 0.17).
"""

import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
FIRST_KEY = 0x243F6A88
SECOND_KEY = 0x85A308D3
"""Where the two key chains begin: the first fractional digits of pi."""


def mix(x: Tensor) -> Tensor:
    """lowbias32: a bijection of [0, 2**32) in which every input bit flips every output bit with probability 1/2."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK_32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK_32
    return x ^ (x >> 16)


def noise_keys(seeds: Tensor, sample_indices: Tensor, positions: Tensor) -> Tensor:
    words = (seeds & MASK_32, (seeds >> 32) & MASK_32, sample_indices & MASK_32, positions & MASK_32)
    chains = []
    for start in (FIRST_KEY, SECOND_KEY):
        state = torch.full_like(seeds, start)
        for word in words:
            state = mix(((state + GOLDEN) & MASK_32) ^ word)
        chains.append(state)
    return torch.stack(chains, dim=-1)


def noise_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    x = mix(token_ids) ^ keys[:, :1]
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D + keys[:, 1:]) & MASK_32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK_32
    return x ^ (x >> 16)


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    uniform = (noise_bits(keys, token_ids).double() + 0.5) / 2**32
    return -torch.log(-torch.log1p(-uniform)).float()


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, _ = logits.max(dim=-1)
    return logits.argmax(dim=-1), values


def penalize(
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    x = logits[rows, token_ids]
    x = torch.where(x > 0, x / repetition, x * repetition)
    x = x - frequency * output_counts
    x = x - presence * (output_counts > 0)
    logits[rows, token_ids] = x


def add_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    logits[rows, token_ids] += bias


def forbid(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    logits[rows, token_ids] = -torch.inf


def restrict(logits: Tensor, rows: Tensor, allowed: Tensor) -> None:
    ids = torch.arange(logits.shape[-1], device=logits.device)
    bits = (allowed[:, ids // 32] >> (ids % 32)) & 1
    logits[rows] = torch.where(bits == 1, logits[rows], -torch.inf)


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]


def keep(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    vocab_size = scaled.shape[-1]
    order = scaled.sort(dim=-1, descending=True, stable=True)
    num_kept = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
    kth_value = order.values.gather(-1, num_kept[:, None] - 1)
    kept = scaled >= kth_value
    mass = torch.where(kept, scaled.double().exp(), 0)
    sorted_mass = mass.gather(-1, order.indices)
    mass_before = sorted_mass.cumsum(dim=-1) - sorted_mass
    in_nucleus = (mass_before < top_p.double()[:, None] * mass.sum(dim=-1, keepdim=True)) | (top_p[:, None] >= 1)
    in_nucleus[:, 0] = True
    kept &= torch.zeros_like(kept).scatter(-1, order.indices, in_nucleus)
    return kept & (mass >= min_p.double()[:, None])


def sample(
    logits: Tensor,
    keys: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    greedy, values = best(logits)
    scaled = scale(logits, torch.where(temperature > 0, temperature, 1))
    scores = scaled + gumbel(keys, torch.arange(logits.shape[-1], device=logits.device))
    if top_k is not None and top_p is not None and min_p is not None:
        scores = torch.where(keep(scaled, top_k, top_p, min_p), scores, -torch.inf)
    return torch.where(temperature > 0, scores.argmax(dim=-1), greedy), values


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = logits.double().log_softmax(dim=-1).float()
    chosen = logprobs.gather(-1, token_ids[:, None])
    ranks = 1 + (logits > logits.gather(-1, token_ids[:, None])).sum(dim=-1)
    top_ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    return chosen[:, 0], ranks, top_ids, logprobs.gather(-1, top_ids)
