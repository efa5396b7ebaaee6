"""What a client asked for, whichever door it came by, with every field resolved and within its limits."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from services.router.gate import PUBLIC, Key
from services.router.limits import check_cache_salt, check_range, invalid, too_long
from services.router.model import ServedModel
from services.router.parsing.parser import Parsing
from services.router.request import GenerateOptions, TokenPrompt
from services.router.structured import structured_of
from shared.ids import new_seed
from shared.sampling import NO_LOGPROBS, Sampling, Stopping, Want
from shared.telemetry.context import Caller

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy: dividing logits by them would overflow float32."""

NO_TOKENS: frozenset[int] = frozenset()
"""One for all: an empty set takes as much as one of four."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a request that say how to answer it; None is unset."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = {}
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    structured: Mapping[str, Any] = {}
    """As for structured.structured_of."""
    parsing: Parsing | None = None
    """As in GenerateOptions."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    deterministic: bool = False
    cache_salt: str = ""
    include_timing: bool = False
    skip_special_tokens: bool = True
    shown_token_ids: frozenset[int] = NO_TOKENS


def token_prompt(token_ids: Sequence[int], model: ServedModel, max_model_len: int) -> TokenPrompt:
    """Token ids as a prompt; their number is checked before anything is converted. Raises RefusedError."""
    if not token_ids:
        raise invalid("token_ids", "is empty")
    if len(token_ids) >= max_model_len:
        raise too_long("token_ids", f"{len(token_ids)} tokens", max_model_len)
    model.limits.check_token_ids("token_ids", token_ids)
    return TokenPrompt(tuple(token_ids))


def resolve(
    asked: Asked,
    model: ServedModel,
    *,
    request_id: str,
    name: str = "",
    key: Key = PUBLIC,
    door: str = "grpc",
    deadline_ns: int | None = None,
    caller: Caller | None = None,
) -> GenerateOptions:
    """Every field resolved: the request, else generation_config, else the default. `name` is the served name that was
    asked for, if one was. Raises RefusedError."""
    model.limits.check_stop(asked.stop, asked.stop_token_ids)
    check_range("priority", asked.priority)
    check_cache_salt(asked.cache_salt)
    return GenerateOptions(
        request_id=request_id,
        model=name or model.names[0],
        sampling=_sampling(asked, model),
        stopping=_stopping(asked, model),
        want=Want(
            logprobs=_given("response.logprobs", asked.logprobs, NO_LOGPROBS),
            prompt_logprobs=_given("response.prompt_logprobs", asked.prompt_logprobs, NO_LOGPROBS),
        ),
        n=_given("sampling.n", asked.n, 1),
        stop=asked.stop,
        structured=structured_of(asked.structured, model, min_tokens=asked.min_tokens, ignore_eos=asked.ignore_eos),
        parsing=asked.parsing,
        priority=key.priority(asked.priority),
        deterministic=asked.deterministic,
        cache_salt=asked.cache_salt,
        include_timing=asked.include_timing,
        skip_special_tokens=asked.skip_special_tokens,
        shown_token_ids=asked.shown_token_ids,
        key=key,
        door=door,
        deadline_ns=deadline_ns,
        caller=caller,
    )


def _given(field: str, value: Any, *defaults: Any) -> Any:
    """A value that was set, within its range, or the first default that is there."""
    if value is None:
        return next(default for default in defaults if default is not None)
    check_range(field, value)
    return value


def _sampling(asked: Asked, model: ServedModel) -> Sampling:
    defaults = model.defaults
    model.limits.check_logit_bias(asked.logit_bias)
    temperature = _given("sampling.temperature", asked.temperature, defaults.temperature, 1.0)
    return Sampling(
        seed=new_seed() if asked.seed is None else _given("sampling.seed", asked.seed),
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=_given("sampling.top_p", asked.top_p, defaults.top_p, 1.0),
        top_k=_given("sampling.top_k", asked.top_k, defaults.top_k, 0),
        min_p=_given("sampling.min_p", asked.min_p, defaults.min_p, 0.0),
        repetition_penalty=_given(
            "sampling.repetition_penalty", asked.repetition_penalty, defaults.repetition_penalty, 1.0
        ),
        presence_penalty=_given("sampling.presence_penalty", asked.presence_penalty, 0.0),
        frequency_penalty=_given("sampling.frequency_penalty", asked.frequency_penalty, 0.0),
        logit_bias=tuple(sorted(asked.logit_bias.items())),
    )


def _stopping(asked: Asked, model: ServedModel) -> Stopping:
    max_tokens = _given("stopping.max_tokens", asked.max_tokens, 0)
    check_range("stopping.min_tokens", asked.min_tokens)
    if max_tokens and asked.min_tokens > max_tokens:
        raise invalid("stopping.min_tokens", f"{asked.min_tokens} exceeds max_tokens, {max_tokens}")
    own = NO_TOKENS if asked.ignore_eos else model.eos_token_ids
    return Stopping(
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens,
        stop_token_ids=own.union(asked.stop_token_ids) if asked.stop_token_ids else own,
        stops_on_text=bool(asked.stop),
    )
