"""The public protobuf ⇄ values. Requests leave here resolved and within limits, or not at all."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from services.router.limits import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    MAX_MESSAGES,
    MAX_TOOLS,
    check_range,
    check_request_id,
    depth_of,
    invalid,
    too_long,
)
from services.router.model import ServedModel
from services.router.request import (
    Accepted,
    ChatPrompt,
    Delta,
    Event,
    Finished,
    GenerateOptions,
    Prompt,
    TextPrompt,
    Timing,
    TokenLogprob,
    TokenPrompt,
)
from services.router.structured import structured_of
from shared.ids import new_request_id, new_seed
from shared.net.options import SPLIT_BYTES
from shared.outcome import FinishReason, refuse
from shared.rpc.sluice.v1 import control_pb2
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.sampling import NO_LOGPROBS, Sampling, Stopping, Want
from shared.structured import Structured
from shared.telemetry.context import Caller
from shared.telemetry.names import SERVICES
from shared.telemetry.spans import Attribute, Trace

GREEDY_BELOW = 1e-5
"""Temperatures below are greedy: dividing logits by them would overflow float32."""


def request_id_of(message: pb.GenerateRequest, header: str) -> str:
    """The body's id, else the `x-request-id` header, else a new one."""
    request_id = message.request_id or header or new_request_id()
    check_request_id(request_id)
    return request_id


def prompt_of(message: pb.GenerateRequest, model: ServedModel, *, max_bytes: int, max_model_len: int) -> Prompt:
    """The input as a value; size is checked before anything is converted."""
    if message.ByteSize() > max_bytes:
        raise refuse("message_too_large", f"the request exceeds {max_bytes} bytes (--max-request-bytes)")
    kind = message.WhichOneof("input")
    if kind == "prompt":
        if not message.prompt:
            raise invalid("prompt", "is empty")
        return TextPrompt(message.prompt)
    if kind == "token_ids":
        return _token_prompt(message.token_ids, model, max_model_len)
    if kind == "chat":
        return _chat_prompt(message.chat, model)
    raise invalid("input", "one of prompt, token_ids and chat is needed")


def _token_prompt(message: pb.TokenIds, model: ServedModel, max_model_len: int) -> TokenPrompt:
    if not message.ids:
        raise invalid("token_ids", "is empty")
    if len(message.ids) >= max_model_len:
        raise too_long("token_ids", f"{len(message.ids)} tokens", max_model_len)
    token_ids = tuple(message.ids)
    model.limits.check_token_ids("token_ids", token_ids)
    return TokenPrompt(token_ids)


def _chat_prompt(message: pb.Chat, model: ServedModel) -> ChatPrompt:
    if model.chat_template is None:
        raise invalid("chat", "this model has no chat template; send `prompt`, or start with --chat-template")
    if not 1 <= len(message.messages) <= MAX_MESSAGES:
        raise invalid("chat.messages", f"1 to {MAX_MESSAGES} messages are allowed")
    tools = _json("chat.tools_json", message.tools_json, list) if message.tools_json else None
    if tools is not None and (len(tools) > MAX_TOOLS or not all(isinstance(tool, dict) for tool in tools)):
        raise invalid("chat.tools_json", f"at most {MAX_TOOLS} JSON objects are allowed")
    kwargs = _json("chat.template_kwargs_json", message.template_kwargs_json or "{}", dict)
    messages = tuple(
        {"role": one.role, "content": one.content, **({"name": one.name} if one.name else {})}
        for one in message.messages
    )
    return ChatPrompt(messages, tools=None if tools is None else tuple(tools), template_kwargs=kwargs)


def _json(field: str, text: str, kind: type) -> Any:
    if len(text) > MAX_JSON_BYTES or len(text.encode()) > MAX_JSON_BYTES:
        raise invalid(field, f"exceeds {MAX_JSON_BYTES} bytes")
    try:
        value: Any = msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        raise invalid(field, f"is not a JSON {'array' if kind is list else 'object'}") from None
    if depth_of(value) > MAX_JSON_DEPTH:
        raise invalid(field, f"nests deeper than {MAX_JSON_DEPTH} levels")
    return value


def options_of(
    message: pb.GenerateRequest,
    model: ServedModel,
    request_id: str,
    deadline_ns: int | None,
    caller: Caller | None = None,
) -> GenerateOptions:
    """Every field resolved: the request, else generation_config, else the default. Raises RefusedError."""
    n = _given(message.sampling, "sampling", "n", 1)
    model.limits.check_stop(message.stopping.stop, message.stopping.stop_token_ids)
    return GenerateOptions(
        request_id=request_id,
        model=message.model or model.names[0],
        sampling=_sampling(message.sampling, model),
        stopping=_stopping(message.stopping, model),
        want=_want(message.response),
        n=n,
        stop=tuple(message.stopping.stop),
        structured=_structured(message, model),
        priority=message.priority,
        deterministic=message.deterministic,
        include_timing=message.response.include_timing,
        deadline_ns=deadline_ns,
        caller=caller,
    )


def _given(message: Any, prefix: str, name: str, default: Any) -> Any:
    """A field that was set, within its range, or the default."""
    if not message.HasField(name):
        return default
    value = getattr(message, name)
    check_range(f"{prefix}.{name}", value)
    return value


def _sampling(message: pb.Sampling, model: ServedModel) -> Sampling:
    defaults = model.defaults
    model.limits.check_logit_bias(message.logit_bias)
    temperature = _given(message, "sampling", "temperature", _or(defaults.temperature, 1.0))
    return Sampling(
        seed=_given(message, "sampling", "seed", None) if message.HasField("seed") else new_seed(),
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=_given(message, "sampling", "top_p", _or(defaults.top_p, 1.0)),
        top_k=_given(message, "sampling", "top_k", _or(defaults.top_k, 0)),
        min_p=_given(message, "sampling", "min_p", _or(defaults.min_p, 0.0)),
        repetition_penalty=_given(message, "sampling", "repetition_penalty", _or(defaults.repetition_penalty, 1.0)),
        presence_penalty=_given(message, "sampling", "presence_penalty", 0.0),
        frequency_penalty=_given(message, "sampling", "frequency_penalty", 0.0),
        logit_bias=tuple(sorted(message.logit_bias.items())),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _stopping(message: pb.Stopping, model: ServedModel) -> Stopping:
    max_tokens = _given(message, "stopping", "max_tokens", 0)
    check_range("stopping.min_tokens", message.min_tokens)
    if max_tokens and message.min_tokens > max_tokens:
        raise invalid("stopping.min_tokens", f"{message.min_tokens} exceeds max_tokens, {max_tokens}")
    own = frozenset() if message.ignore_eos else model.eos_token_ids
    ends = own | frozenset(message.stop_token_ids)
    return Stopping(
        max_tokens=max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=ends,
        stops_on_text=bool(message.stop),
    )


def _structured(message: pb.GenerateRequest, model: ServedModel) -> Structured | None:
    kind = message.structured.WhichOneof("constraint")
    if kind is None:
        return None
    value = getattr(message.structured, kind)
    given = {kind: list(value.options) if kind == "choice" else value}
    stopping = message.stopping
    return structured_of(given, model, min_tokens=stopping.min_tokens, ignore_eos=stopping.ignore_eos)


def _want(message: pb.ResponseOptions) -> Want:
    return Want(
        logprobs=_given(message, "response", "logprobs", NO_LOGPROBS),
        prompt_logprobs=_given(message, "response", "prompt_logprobs", NO_LOGPROBS),
    )


REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


SPLIT_TOKENS = SPLIT_BYTES // 8
SPLIT_CHARS = SPLIT_BYTES // 4
"""So many surely fit into SPLIT_BYTES: a token id takes at most 5 bytes, a character 4."""


def responses_of(event: Event) -> Iterator[pb.GenerateResponse]:
    """An event as the messages that a client reads. There are several where one might exceed the 4 MiB that a gRPC
    client takes by default, which would end its stream: a Delta that merged much, the logprobs of a long prompt."""
    match event:
        case Delta():
            for delta in _deltas(event):
                yield pb.GenerateResponse(delta=delta)
        case Accepted():
            for part in _in_parts(event.prompt_logprobs):
                yield pb.GenerateResponse(accepted=_accepted(event, part))
        case Finished():
            yield pb.GenerateResponse(finished=_finished(event))


def _deltas(event: Delta) -> Iterator[pb.Delta]:
    """One; where that is too large, tokens first and their text behind them, as text that is held back comes too."""
    index, logprobs = event.index, [_logprobs(one) for one in event.logprobs]
    whole = pb.Delta(index=index, text=event.text, token_ids=event.token_ids, logprobs=logprobs)
    if whole.ByteSize() <= SPLIT_BYTES:
        yield whole
        return
    if event.logprobs:
        for part in _in_parts(event.logprobs):
            yield pb.Delta(index=index, token_ids=[one.token_id for one in part], logprobs=part)
    else:
        for start in range(0, len(event.token_ids), SPLIT_TOKENS):
            yield pb.Delta(index=index, token_ids=event.token_ids[start : start + SPLIT_TOKENS])
    for start in range(0, len(event.text), SPLIT_CHARS):
        yield pb.Delta(index=index, text=event.text[start : start + SPLIT_CHARS])


def _in_parts(logprobs: Sequence[TokenLogprob]) -> Iterator[list[pb.Logprobs]]:
    """As few lists of about SPLIT_BYTES as hold them all, at least one; each is made when it is asked for."""
    part: list[pb.Logprobs] = []
    size = 0
    for one in logprobs:
        message = _logprobs(one)
        size += message.ByteSize()
        part.append(message)
        if size > SPLIT_BYTES:
            yield part
            part, size = [], 0
    if part or not logprobs:
        yield part


def _accepted(event: Accepted, logprobs: list[pb.Logprobs]) -> pb.Accepted:
    return pb.Accepted(
        request_id=event.request_id,
        prompt_tokens=event.prompt_tokens,
        seed=event.seed,
        prompt_logprobs=logprobs,
    )


def _logprobs(one: TokenLogprob) -> pb.Logprobs:
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob, token=token) for token_id, logprob, token in one.top]
    return pb.Logprobs(token_id=one.token_id, logprob=one.logprob, rank=one.rank, top=top)


def _finished(event: Finished) -> pb.Finished:
    finished = pb.Finished(index=event.index, reason=REASONS[event.reason])
    if event.stop is not None:
        finished.stop_match.stop = event.stop
    elif event.stop_token_id is not None:
        finished.stop_match.token_id = event.stop_token_id
    if event.usage is not None:
        finished.usage.CopyFrom(pb.Usage(**msgspec.structs.asdict(event.usage)))
    if event.timing is not None:
        finished.timing.CopyFrom(_timing(event.timing))
    return finished


def _timing(timing: Timing) -> pb.Timing:
    return pb.Timing(**msgspec.structs.asdict(timing))


def trace_message(trace: Trace) -> control_pb2.Trace:
    return control_pb2.Trace(
        request_id=trace.request_id,
        trace_id=trace.trace_id.hex(),
        arrived_unix_ns=trace.arrived_ns,
        spans=[
            control_pb2.TraceSpan(
                name=span.name,
                service=SERVICES[span.service],
                instance=span.instance,
                parent=span.parent,
                start_ns=span.start_ns,
                duration_ns=span.duration_ns,
                attributes={key: _shown(value) for key, value in span.attributes.items()},
                error=span.error,
            )
            for span in trace.spans
        ],
    )


def _shown(value: Attribute) -> str:
    """An attribute as text; lists by commas."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    return f"{value:g}" if isinstance(value, float) else ",".join(map(str, value))
