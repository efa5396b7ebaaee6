"""How a request is sampled and when it stops: resolved values, no field left open."""

import msgspec


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What a sampler needs for one request. Defaults are the neutral values.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed` is in [0, 2**64).
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


class Stopping(msgspec.Struct, frozen=True, kw_only=True):
    """When a sample ends. `stop_token_ids` holds end-of-sequence tokens too, unless they are to be ignored.

    `max_tokens` 0 means as many as fit. Stop strings are text and stay with the router; `stops_on_text` says that there
    are some, so that a sample may end early.
    """

    max_tokens: int = 0
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    stops_on_text: bool = False


NO_LOGPROBS = -1


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """What else to return: logprobs of generated and prompt tokens (-1: none; k: also the k best)."""

    logprobs: int = NO_LOGPROBS
    prompt_logprobs: int = NO_LOGPROBS


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Raw log-probability of one token, its rank (1 is best), and the best alternatives, best first."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
