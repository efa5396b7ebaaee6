"""What a client asks for and what it is told, as values: two doors (gRPC, HTTP), one hall (session.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from services.router.gate import PUBLIC, Key
from services.router.parsing.parser import Parsing
from shared.outcome import FinishReason
from shared.sampling import Sampling, Stopping, Want
from shared.structured import Structured
from shared.telemetry.context import Caller


class TextPrompt(msgspec.Struct, frozen=True, tag=True):
    """Text to be tokenized as it is, with the special tokens that the checkpoint adds (`add_special_tokens`)."""

    text: str
    add_special_tokens: bool = True


class TokenPrompt(msgspec.Struct, frozen=True, tag=True):
    """Token ids, taken as they are."""

    token_ids: tuple[int, ...]


class ChatPrompt(msgspec.Struct, frozen=True, tag=True):
    """A conversation for the chat template. Messages are mappings as templates expect them. The answer is a message of
    its own, or goes on with the last one (`continue_final_message`)."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None = None
    template_kwargs: Mapping[str, Any] = {}
    continue_final_message: bool = False


Prompt = TextPrompt | TokenPrompt | ChatPrompt


class GenerateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to answer, every field resolved and within its limits.

    `stop` strings never reach a scheduler; `stopping` does. `model` is a served name.
    """

    request_id: str
    model: str
    sampling: Sampling
    stopping: Stopping = Stopping()
    want: Want = Want()
    n: int = 1
    stop: tuple[str, ...] = ()
    structured: Structured | None = None
    parsing: Parsing | None = None
    """What an answer with a structure may hold beside that, or instead of it."""
    priority: int = 0
    deterministic: bool = False
    cache_salt: str = ""
    """Requests share cached blocks with those of the same one only."""
    include_timing: bool = False
    skip_special_tokens: bool = True
    """Whether special tokens have no text in the answer."""
    shown_token_ids: frozenset[int] = frozenset()
    """Special tokens that have text nonetheless: they mark parts of the answer."""
    key: Key = PUBLIC
    """Whose request it is."""
    door: str = "grpc"
    """By which the request came: grpc or http."""
    deadline_ns: int | None = None
    """Time left to the client when the request arrived."""
    caller: Caller | None = None
    """Its place in its own trace, where it has one."""

    @property
    def salt(self) -> bytes:
        """Of the hashes of its blocks: its tenant's, and its own."""
        own = self.cache_salt.encode()
        return self.key.salt if not own else b"%d\0%b\0%b" % (len(own), own, self.key.salt)


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token's raw log-probability; `top` holds (token id, log-probability, the token's bytes), best first.

    A prompt's first token has no log-probability: rank 0.
    """

    token_id: int
    logprob: float = 0.0
    rank: int = 0
    top: tuple[tuple[int, float, bytes], ...] = ()


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first event of an answer."""

    request_id: str
    prompt_tokens: int
    seed: int
    prompt_ids: Sequence[int] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """More of one sample. `text` may be empty while a character or a possible stop string is incomplete."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of the whole request, the prompt counted once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """admit, tokenize, route, schedule and deliver sum to total; link, queue, prefill and decode sum to schedule."""

    total_ns: int
    admit_ns: int
    tokenize_ns: int = 0
    route_ns: int = 0
    schedule_ns: int = 0
    link_ns: int = 0
    queue_ns: int = 0
    prefill_ns: int = 0
    decode_ns: int = 0
    deliver_ns: int = 0
    time_to_first_token_ns: int = 0
    preemptions: int = 0
    queue_reason_ns: Mapping[str, int] = {}


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The end of one sample. `stop` or `stop_token_id` say what matched; usage and timing come with the last one."""

    index: int
    reason: FinishReason
    stop: str | None = None
    stop_token_id: int | None = None
    usage: Usage | None = None
    timing: Timing | None = None


Event = Accepted | Delta | Finished
