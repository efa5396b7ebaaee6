"""From a JSON body to what a Session takes: prompts and options, resolved and within limits, or refused by name."""

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import msgspec

from services.router.gate import PUBLIC, Key
from services.router.http.errors import plainly, renamed
from services.router.http.schema import (
    UNSERVED,
    ChatRequest,
    Common,
    CompletionRequest,
    TokenId,
    TokenizeRequest,
    unserved,
)
from services.router.http.structure import Structure, structure_of
from services.router.http.tools import Offer, Tool, check_tools, past_calls, tools_offered
from services.router.limits import MAX_MESSAGES, check_depth, check_request_id, invalid
from services.router.model import ServedModel
from services.router.parsing.families import forced
from services.router.parsing.parser import Parsing
from services.router.parsing.thinking import Thinking
from services.router.request import ChatPrompt, GenerateOptions, Prompt, TextPrompt, TokenPrompt
from services.router.resolve import NO_TOKENS, Asked, resolve, token_prompt
from shared.ids import new_request_id
from shared.outcome import RefusedError, refuse
from shared.sampling import NO_LOGPROBS
from shared.telemetry.context import Caller

MAX_PROMPTS = 1024
COMPLETION_TOKENS = 16
"""`max_tokens` of a completion that does not say: OpenAI's default. A chat goes on to its end."""
MAX_IGNORED_NAMED = 32
_FIELD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
PASSED = ("name", "tool_calls", "tool_call_id", "reasoning", "reasoning_content")
"""What else of a message its template may know."""

T = TypeVar("T")


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request: each prompt with its options, and how the answers are to be told."""

    prompts: tuple[Prompt, ...]
    options: tuple[GenerateOptions, ...]
    request_id: str
    model: str
    chat: bool
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int = NO_LOGPROBS
    prompt_logprobs: int = NO_LOGPROBS
    echo: bool = False
    echo_only: bool = False
    """Nothing but the echo is wanted: `max_tokens` is 0."""
    include_stop: bool = False
    stop_token_ids: frozenset[int] = NO_TOKENS
    """Those that the client named; the model's own ends of sequence are none of them, and no `stop_reason`."""
    token_ids: bool = False
    tokens_as_ids: bool = False
    params: dict[str, str] = {}
    """What the client calls some of the fields, by the names that refusals give them."""
    parsing: Parsing | None = None
    """How the answers are taken apart; None: all of their text is content."""
    include_reasoning: bool = True
    called_by_name: bool = False
    """The answer is the arguments of the one tool that the request names."""

    @property
    def n(self) -> int:
        """Answers to each prompt."""
        return self.options[0].n


class Source(msgspec.Struct, frozen=True):
    """What the headers of a request say of it, and whose it is."""

    request_id: str = ""
    caller: Caller | None = None
    key: Key = PUBLIC


def decode(body: bytes, kind: type[T]) -> T:
    """Raises RefusedError naming the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        field, what = plainly(error)
        raise (invalid(field, what) if field else refuse("invalid_argument", what)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise refuse("invalid_argument", f"the body is not valid JSON: {error}") from None


def ignored_fields(body: bytes, kind: type[msgspec.Struct]) -> list[str]:
    """The fields of a body that a request of this kind does not have; of those that a header can name, the first
    MAX_IGNORED_NAMED. Raises RefusedError."""
    known = kind.__struct_fields__
    unknown = (name for name in decode(body, dict[str, msgspec.Raw]) if name not in known and _FIELD.fullmatch(name))
    return list(islice(unknown, MAX_IGNORED_NAMED))


def completion(request: CompletionRequest, model: ServedModel, max_model_len: int, source: Source) -> Question:
    """Raises RefusedError."""
    _check(request, model)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise refuse("unsupported", "best_of: is served only where it equals n", field="best_of")
    echo, max_tokens = bool(request.echo), request.max_tokens
    echo_only = echo and max_tokens == 0
    prompts = _prompts(request, model, max_model_len)
    max_tokens = 1 if echo_only else COMPLETION_TOKENS if max_tokens is None else max_tokens
    of_prompt = [k for k in (request.prompt_logprobs, request.logprobs if echo else None) if k is not None]
    asked = _asked(
        request, max_tokens=max_tokens, logprobs=request.logprobs, prompt_logprobs=max(of_prompt, default=None)
    )
    return _question(
        request,
        model,
        prompts,
        asked,
        structure_of(request),
        source,
        chat=False,
        logprobs=NO_LOGPROBS if request.logprobs is None else request.logprobs,
        echo=echo,
        echo_only=echo_only,
    )


def chat(request: ChatRequest, model: ServedModel, source: Source) -> Question:
    """Raises RefusedError."""
    _check(request, model)
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "needs logprobs to be true")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    asked = _asked(request, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=request.prompt_logprobs)
    offer = tools_offered(request.tools, request.tool_choice, request.parallel_tool_calls, model)
    structure = structure_of(request)
    parsing = _parsing(request, model, offer, structure)
    if offer.demanded:
        structure = Structure("tools", {"json_schema": offer.schema()})
    beside = parsing if structure.field and not offer.demanded else None
    asked = msgspec.structs.replace(asked, shown_token_ids=_marks(parsing, model), parsing=beside)
    known = {"documents": request.documents, "reasoning_effort": request.reasoning_effort}
    return _question(
        request,
        model,
        (_chat_prompt(request, model, offer.tools, **known),),
        asked,
        structure,
        source,
        chat=True,
        logprobs=NO_LOGPROBS if logprobs is None else logprobs,
        parsing=parsing,
        include_reasoning=request.include_reasoning is not False,
        called_by_name=bool(offer.named),
    )


def _parsing(request: ChatRequest, model: ServedModel, offer: Offer, structure: Structure) -> Parsing | None:
    """A message that is continued has its reasoning behind it, and calls that are demanded leave no room for any.
    Before a structure only reasoning between two marks is known. Raises RefusedError."""
    if structure.field and offer.tools:
        _require_either(structure.field, offer, model)
    thinking = None if request.continue_final_message or offer.demanded else model.thinking
    if structure.field and not isinstance(thinking, Thinking):
        thinking = None
    tool_calls = model.tool_calls if offer.tools else None
    if offer.demanded:
        tool_calls = forced(model.tool_calls, named=bool(offer.named))
    if thinking is None and tool_calls is None:
        return None
    return Parsing(thinking=thinking, tool_calls=tool_calls, tools=offer.schemas, parallel=offer.parallel)


def _require_either(field: str, offer: Offer, model: ServedModel) -> None:
    """An answer has the structure or calls tools: the model must be free to choose, and its calls between marks. Raises
    RefusedError."""
    if offer.demanded:
        raise invalid(field, 'calls are demanded, so nothing has this structure; send tool_choice "auto" or "none"')
    if model.tool_calls is None or not model.tool_calls.enclosing[0]:
        message = f'{field}: beside it this model calls no tools, whose calls have no marks; send tool_choice "none"'
        raise refuse("unsupported", message, field=field)


def _marks(parsing: Parsing | None, model: ServedModel) -> frozenset[int]:
    """The special tokens among the marks that a parser must see."""
    if parsing is None:
        return NO_TOKENS
    token_ids = {model.tokenizer.token_id(mark) for mark in parsing.marks}
    return model.tokenizer.texts.special_ids & token_ids


def to_tokenize(request: TokenizeRequest, model: ServedModel) -> TextPrompt | ChatPrompt:
    """Raises RefusedError."""
    _check_served(request, model)
    if request.messages is not None:
        return _chat_prompt(request, model, check_tools(request.tools, model))
    if request.prompt is None:
        raise invalid("prompt", "one of prompt and messages is needed")
    return TextPrompt(request.prompt, request.add_special_tokens is not False)


def _check(request: Common, model: ServedModel) -> None:
    _check_served(request, model)
    if request.structured_outputs is not None:
        _check_unserved(request.structured_outputs, "structured_outputs.")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "needs stream to be true")
    if request.prompt_logprobs is not None and request.stream:
        raise invalid("prompt_logprobs", "is not told in a stream; leave out stream")


def _check_served(request: Common | TokenizeRequest, model: ServedModel) -> None:
    if request.model:
        model.check_name(request.model)
    _check_unserved(request)


def _check_unserved(request: msgspec.Struct, within: str = "") -> None:
    name = unserved(request)
    if name:
        raise refuse("unsupported", f"{within}{name}: {UNSERVED[name]}", field=within + name)


def _asked(request: Common, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> Asked:
    stop = () if request.stop is None else request.stop
    return Asked(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=0 if request.top_k == -1 else request.top_k,
        min_p=request.min_p,
        seed=_unsigned(request.seed),
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=_logit_bias(request.logit_bias or {}),
        n=request.n,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=request.stop_token_ids or (),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        priority=request.priority or 0,
        deterministic=bool(request.deterministic),
        cache_salt=_cache_salt(request.cache_salt),
        include_timing=bool(request.include_timing),
        skip_special_tokens=request.skip_special_tokens is not False,
    )


def _cache_salt(given: str | None) -> str:
    if given == "":
        raise invalid("cache_salt", "is empty; leave it out for none")
    return given or ""


def _unsigned(seed: int | None) -> int | None:
    """OpenAI's seeds have a sign."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise invalid("seed", f"must be from {-(2**63)} to {2**64 - 1}, not {seed}")
    return None if seed is None else seed % 2**64


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    """JSON's keys are strings."""
    if not all(key.isascii() and key.isdecimal() for key in given):
        raise invalid("logit_bias", "its keys are token ids")
    return {int(key): bias for key, bias in given.items()}


def _question(
    request: Common,
    model: ServedModel,
    prompts: tuple[Prompt, ...],
    asked: Asked,
    structure: Structure,
    source: Source,
    **told: Any,
) -> Question:
    """`told` are fields of the Question that only one kind of request has."""
    if len(prompts) > 1 and asked.include_timing:
        raise invalid("include_timing", "is told of one prompt, not of several")
    request_id = request.request_id or source.request_id or new_request_id()
    ids = [request_id] if len(prompts) == 1 else [f"{request_id}-{at}" for at in range(len(prompts))]
    check_request_id(ids[-1])
    stream = request.stream_options
    known: dict[str, Any] = {"name": request.model or "", "key": source.key, "caller": source.caller, "door": "http"}
    asked = msgspec.structs.replace(asked, structured=structure.given)
    params = {**structure.params, **_names_of(request)}
    try:
        options = tuple(resolve(asked, model, request_id=one, **known) for one in ids)  # each with a seed of its own
    except RefusedError as error:
        raise RefusedError(renamed(error.refusal, params)) from None
    return Question(
        prompts=prompts,
        options=options,
        request_id=request_id,
        model=options[0].model,
        stream=bool(request.stream),
        include_usage=bool(stream and stream.include_usage),
        continuous_usage=bool(stream and stream.continuous_usage_stats),
        prompt_logprobs=NO_LOGPROBS if request.prompt_logprobs is None else request.prompt_logprobs,
        include_stop=bool(request.include_stop_str_in_output),
        stop_token_ids=frozenset(asked.stop_token_ids),
        token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        params=params,
        **told,
    )


def _names_of(request: Common) -> dict[str, str]:
    """What this request calls the fields that have two names."""
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return {"stopping.max_tokens": "max_completion_tokens"}
    return {}


def _prompts(request: CompletionRequest, model: ServedModel, max_model_len: int) -> tuple[Prompt, ...]:
    """Of a text, of token ids, of a list of texts or of token lists."""
    given = request.prompt
    special = request.add_special_tokens is not False
    if isinstance(given, str):
        return (_text(given, special),)
    if not given:
        raise invalid("prompt", "is needed" if given is None else "is empty")
    if isinstance(given[0], int):
        return (_tokens(given, model, max_model_len),)
    if len(given) > MAX_PROMPTS:
        raise invalid("prompt", f"{len(given)} prompts; {MAX_PROMPTS} are allowed")
    if isinstance(given[0], str):
        return tuple(_text(text, special) for text in _convert("prompt", given, list[str]))
    return tuple(_tokens(one, model, max_model_len) for one in given)


def _text(text: str, add_special_tokens: bool) -> TextPrompt:
    if not text:
        raise invalid("prompt", "is empty")
    return TextPrompt(text, add_special_tokens)


def _tokens(given: Any, model: ServedModel, max_model_len: int) -> TokenPrompt:
    return token_prompt(_convert("prompt", given, list[TokenId]), model, max_model_len)


def _convert(field: str, value: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        at, what = plainly(error)
        raise invalid(field, f"{at} {what}".strip()) from None


def _chat_prompt(
    request: ChatRequest | TokenizeRequest, model: ServedModel, tools: Sequence[Tool], **known: Any
) -> ChatPrompt:
    """`known` goes to the template beside what the client names for it."""
    if model.chat_template is None:
        raise invalid("chat", "this model has no chat template; use /v1/completions, or start with --chat-template")
    messages = request.messages or []
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise invalid("messages", f"1 to {MAX_MESSAGES} messages are allowed")
    if request.continue_final_message and request.add_generation_prompt:
        raise invalid(
            "continue_final_message", "a message is continued or a new one begun: unset add_generation_prompt"
        )
    kwargs = {**(request.chat_template_kwargs or {}), **{key: one for key, one in known.items() if one is not None}}
    check_depth("chat_template_kwargs", kwargs)
    if request.add_generation_prompt is not None:
        kwargs["add_generation_prompt"] = request.add_generation_prompt
    return ChatPrompt(
        tuple(_message(f"messages[{at}]", one) for at, one in enumerate(messages)),
        tools=tuple(tools) or None,
        template_kwargs=kwargs,
        continue_final_message=bool(request.continue_final_message),
    )


def _message(field: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """As templates expect it: the content is text."""
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise invalid(f"{field}.role", "is needed, and is a string")
    content = given.get("content")
    if content is not None and not isinstance(content, str):
        content = _joined(f"{field}.content", content)
    passed = {name: given[name] for name in PASSED if given.get(name) is not None}
    if "reasoning" in passed:  # what newer clients call it; templates know the older name
        passed.setdefault("reasoning_content", passed["reasoning"])
    check_depth(field, passed)
    if "tool_calls" in passed:
        passed["tool_calls"] = past_calls(f"{field}.tool_calls", passed["tool_calls"])
        check_depth(f"{field}.tool_calls", passed["tool_calls"])
    return {"role": role, "content": content or "", **passed}


def _joined(field: str, parts: Any) -> str:
    """Of a content in parts, which are texts."""
    if not isinstance(parts, list):
        raise invalid(field, "is a string or a list of parts")
    return "\n".join(_part(f"{field}[{at}]", part) for at, part in enumerate(parts))


def _part(field: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(kind, str) and kind != "text":
        raise refuse("unsupported", f"{field}: this model takes text, not {kind[:64]!r}", field=field)
    raise invalid(field, 'is {"type": "text", "text": …}')
