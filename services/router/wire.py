"""The public protobuf ⇄ values. Requests leave here resolved and within limits, or not at all."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from services.router.gate import PUBLIC, Key
from services.router.limits import (
    MAX_JSON_BYTES,
    MAX_MESSAGES,
    MAX_TOOLS,
    check_depth,
    check_request_id,
    invalid,
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
)
from services.router.resolve import Asked, resolve, token_prompt
from shared.ids import new_request_id
from shared.net.options import SPLIT_BYTES
from shared.outcome import FinishReason, refuse
from shared.rpc.sluice.v1 import control_pb2
from shared.rpc.sluice.v1 import inference_pb2 as pb
from shared.telemetry.context import Caller
from shared.telemetry.names import SERVICES
from shared.telemetry.spans import Attribute, Trace


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
        return token_prompt(message.token_ids.ids, model, max_model_len)
    if kind == "chat":
        return _chat_prompt(message.chat, model)
    raise invalid("input", "one of prompt, token_ids and chat is needed")


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
    check_depth(field, value)
    return value


def options_of(
    message: pb.GenerateRequest,
    model: ServedModel,
    request_id: str,
    deadline_ns: int | None,
    caller: Caller | None = None,
    key: Key = PUBLIC,
) -> GenerateOptions:
    """Every field resolved and within its limits. Raises RefusedError."""
    sampling, stopping, response = message.sampling, message.stopping, message.response
    asked = Asked(
        **_set(sampling, SAMPLING),
        **_set(stopping, STOPPING),
        **_set(response, RESPONSE),
        logit_bias=sampling.logit_bias,
        min_tokens=stopping.min_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=stopping.stop_token_ids,
        ignore_eos=stopping.ignore_eos,
        structured=_structured(message.structured),
        priority=message.priority,
        deterministic=message.deterministic,
        cache_salt=message.cache_salt,
        include_timing=response.include_timing,
    )
    name = message.model
    return resolve(asked, model, request_id=request_id, name=name, key=key, deadline_ns=deadline_ns, caller=caller)


SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "n",
)
STOPPING = ("max_tokens",)
RESPONSE = ("logprobs", "prompt_logprobs")
"""Fields of a message that know whether they were set."""


def _set(message: Any, names: Sequence[str]) -> dict[str, Any]:
    """Of these fields those that were set."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _structured(message: pb.Structured) -> dict[str, Any]:
    """The constraint that was set, if one was, by its kind."""
    kind = message.WhichOneof("constraint")
    if kind is None:
        return {}
    return {kind: list(message.choice.options) if kind == "choice" else getattr(message, kind)}


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
