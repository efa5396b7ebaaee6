"""From a Session's events to the JSON that clients read: one body, or chunks of it as server-sent events.

A chunk of plain text is put together from bytes that are made once an answer: it is what a token costs.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from services.router.http.messages import Message
from services.router.http.requests import Question
from services.router.parsing.parser import Parser
from services.router.parsing.thinking import TAIL_TOKENS
from services.router.request import Accepted, Delta, Finished, TextPrompt, Timing, TokenLogprob, Usage
from shared.clock import NS_PER_MS
from shared.outcome import FinishReason
from shared.text.detokenizer import Detokenizer
from shared.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity."""
DONE = b"data: [DONE]\n\n"
REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
"""How an answer may end. Any other end is an error, told as such."""

_encode = msgspec.json.Encoder().encode


def event_of(body: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + body + b"\n\n"


@dataclass(slots=True)
class _Choice:
    """One answer as it grows. The lists are kept for a whole body, not for a stream."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: dict[str, Any] = field(default_factory=lambda: {"finish_reason": None, "stop_reason": None})
    num_tokens: int = 0
    text_offset: int = 0
    """Where the next token begins in the text that is shown, in characters."""
    shown: Detokenizer | None = None
    """What the tokens add to that text, where offsets are told."""
    begun: bool = False
    parser: Parser | None = None
    """Of a chat whose answers are taken apart, once the prompt is known."""
    message: Message = field(default_factory=Message)


@dataclass(slots=True)
class _Asked:
    """One prompt and what is known of it."""

    accepted: Accepted | None = None
    usage: Usage | None = None


class Telling:
    """Tells the answers to one Question. Subclasses know the shape of one endpoint."""

    kind = chunk_kind = prefix = ""

    def __init__(self, question: Question, tokenizer: Tokenizer) -> None:
        self._question = question
        self._tokenizer = tokenizer
        self._asked = [_Asked() for _ in question.prompts]
        self._choices = [_Choice() for _ in range(len(question.prompts) * question.n)]
        self._timing: Timing | None = None
        self._head = {"id": f"{self.prefix}-{question.request_id}", "object": self.kind, "created": int(time.time())}
        self._head["model"] = question.model
        opening = _encode({**self._head, "object": self.chunk_kind})[:-1] + b',"choices":['
        self._opening = b"data: " + opening
        self._closing = b'],"usage":null}\n\n' if question.include_usage else b"]}\n\n"
        self._plain_end = b',"logprobs":null,"finish_reason":null}' + self._closing
        self._starts = [self._opening + self._start(index) for index in range(len(self._choices))]
        self._is_told = question.logprobs >= 0 or question.token_ids or question.continuous_usage
        """Whether there is more to tell of a piece than its text."""
        self._is_plain = not (self._is_told or question.echo_only or question.parsing)

    # A stream.

    def chunks(self, at: int, event: Accepted | Delta | Finished) -> bytes:
        """An event of the at-th prompt as server-sent events; empty where it says nothing."""
        if isinstance(event, Delta):
            index = at * self._question.n + event.index
            choice = self._choices[index]
            choice.num_tokens += 0 if self._question.echo_only else len(event.token_ids)
            if self._is_plain:
                return self._begin(at, index, choice) + self._plain(index, event.text) if event.text else b""
            if self._question.echo_only:
                return b""
            piece = self._piece(choice, event.text)
            if not (self._is_told or _says(piece)):
                return b""
            return self._begin(at, index, choice) + self._full(at, index, choice, piece, event)
        if isinstance(event, Accepted):
            self._accept(at, event)
            return b""
        return self._end(at, event)

    def last_chunk(self) -> bytes:
        """What follows the last event."""
        if not self._question.include_usage:
            return DONE
        body = {**self._head, "object": self.chunk_kind, "choices": [], "usage": self._usage()}
        return event_of(_encode({**body, **self._extras()})) + DONE

    def _plain(self, index: int, text: str) -> bytes:
        return self._starts[index] + _encode(text) + self._text_end + self._plain_end

    def _full(self, at: int, index: int, choice: _Choice, piece: dict[str, Any], event: Delta) -> bytes:
        told: dict[str, Any] = {"index": index, **piece, "logprobs": None, "finish_reason": None}
        if self._question.logprobs >= 0:
            told["logprobs"] = self._logprobs(event.logprobs, choice)
        if self._question.token_ids:
            told["token_ids"] = event.token_ids
        return self._chunk(at, choice, told)

    def _chunk(self, at: int, choice: _Choice, told: Mapping[str, Any], **more: Any) -> bytes:
        """One with the usage so far, where that is wanted."""
        body = {**self._head, "object": self.chunk_kind, "choices": [told], **more}
        if self._question.continuous_usage:
            body["usage"] = _usage_of(self._prompt_tokens(at), choice.num_tokens)
        elif self._question.include_usage:
            body["usage"] = None
        return event_of(_encode(body))

    def _begin(self, at: int, index: int, choice: _Choice) -> bytes:
        """What comes before the first piece of an answer."""
        if choice.begun:
            return b""
        choice.begun = True
        told, more = self._first(at, choice)
        if not told:
            return b""
        return self._chunk(at, choice, {"index": index, "logprobs": None, "finish_reason": None, **told}, **more)

    def _end(self, at: int, event: Finished) -> bytes:
        index = at * self._question.n + event.index
        choice = self._choices[index]
        self._account(at, event)
        if event.reason not in REASONS:
            return b""
        begin = self._begin(at, index, choice)
        stop = event.stop if event.stop and self._question.include_stop else ""
        last = self._last_piece(choice, stop)
        told = {"index": index, **last, "logprobs": None, **self._finish(choice, event)}
        more = {} if self._question.include_usage else self._extras()
        return begin + self._chunk(at, choice, told, **more)

    # A whole body.

    def take(self, at: int, event: Accepted | Delta | Finished) -> None:
        """Keeps what an event of the at-th prompt says."""
        if isinstance(event, Accepted):
            return self._accept(at, event)
        choice = self._choices[at * self._question.n + event.index]
        if isinstance(event, Finished):
            self._account(at, event)
            self._keep(choice, event.stop if event.stop and self._question.include_stop else "", last=True)
            choice.finish = self._finish(choice, event)
            return
        choice.num_tokens += len(event.token_ids)
        if not self._question.echo_only:
            self._keep(choice, event.text)
            choice.token_ids += event.token_ids
            choice.logprobs += event.logprobs

    def body(self) -> bytes:
        """Of the answers, once every prompt has ended."""
        n = self._question.n
        choices = [
            {"index": index, **self._whole(index // n, choice), **choice.finish, **self._tokens(index // n, choice)}
            for index, choice in enumerate(self._choices)
        ]
        return _encode({**self._head, "choices": choices, "usage": self._usage(), **self._extras(whole=True)})

    def _tokens(self, at: int, choice: _Choice) -> dict[str, Any]:
        return {"token_ids": choice.token_ids} if self._question.token_ids else {}

    # Both.

    def _accept(self, at: int, event: Accepted) -> None:
        self._asked[at].accepted = event

    def _account(self, at: int, event: Finished) -> None:
        if event.usage is not None:
            self._asked[at].usage = event.usage
        if event.timing is not None:
            self._timing = event.timing

    def _finish(self, choice: _Choice, event: Finished) -> dict[str, Any]:
        reason = "length" if self._question.echo_only else REASONS.get(event.reason)
        named = event.stop_token_id if event.stop_token_id in self._question.stop_token_ids else None
        return {"finish_reason": reason, "stop_reason": named if event.stop is None else event.stop}

    def _usage(self) -> dict[str, Any]:
        """Of all prompts together."""
        usages = [asked.usage for asked in self._asked if asked.usage is not None]
        completion = 0 if self._question.echo_only else sum(usage.completion_tokens for usage in usages)
        told = _usage_of(sum(usage.prompt_tokens for usage in usages), completion)
        return {**told, "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)}}

    def _extras(self, whole: bool = False) -> dict[str, Any]:
        """What our own fields ask for."""
        return {} if self._timing is None else {"timing": timing_of(self._timing)}

    def _prompt_tokens(self, at: int) -> int:
        accepted = self._asked[at].accepted
        return accepted.prompt_tokens if accepted else 0

    def _prompt_ids(self, at: int) -> list[int]:
        accepted = self._asked[at].accepted
        return list(accepted.prompt_ids) if accepted else []

    def _prompt_logprobs(self, at: int, best: int) -> list[dict[str, Any] | None]:
        """As vLLM tells them: by token id, the prompt's own first; nothing for the first token."""
        accepted = self._asked[at].accepted
        given = accepted.prompt_logprobs if accepted else ()
        return [self._by_token_id(one, best) if one.rank else None for one in given]

    def _by_token_id(self, one: TokenLogprob, best: int) -> dict[str, Any]:
        entries = [(one.token_id, one.logprob, one.rank)]
        entries += [(token_id, value, rank) for rank, (token_id, value, _) in enumerate(one.top[:best], 1)]
        told: dict[str, Any] = {}
        for token_id, value, rank in entries:
            name = self._name(token_id)
            told.setdefault(str(token_id), {"logprob": _finite(value), "rank": rank, "decoded_token": name})
        return told

    def _name(self, token_id: int) -> str:
        """A token by itself, as far as it is text."""
        if self._question.tokens_as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.texts.token_bytes(token_id).decode("utf-8", "replace")

    # The shape of an endpoint.

    _text_end = b""

    def _start(self, index: int) -> bytes:
        """A plain piece up to its text."""
        raise NotImplementedError

    def _piece(self, choice: _Choice, text: str) -> dict[str, Any]:
        """The part of a chunk that has the text."""
        raise NotImplementedError

    def _last_piece(self, choice: _Choice, text: str) -> dict[str, Any]:
        """The same, of the chunk that ends an answer."""
        return self._piece(choice, text)

    def _keep(self, choice: _Choice, text: str, *, last: bool = False) -> None:
        """More of the text of a whole body's answer."""
        choice.texts.append(text)

    def _first(self, at: int, choice: _Choice) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a chunk before the first piece has in its choice, if there is one, and beside it."""
        raise NotImplementedError

    def _whole(self, at: int, choice: _Choice) -> dict[str, Any]:
        """An answer of a whole body."""
        raise NotImplementedError

    def _logprobs(self, given: Iterable[TokenLogprob], choice: _Choice) -> dict[str, Any]:
        raise NotImplementedError


class CompletionTelling(Telling):
    """/v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _start(self, index: int) -> bytes:
        return b'{"index":%d,"text":' % index

    def _piece(self, choice: _Choice, text: str) -> dict[str, Any]:
        return {"text": text}

    def _first(self, at: int, choice: _Choice) -> tuple[dict[str, Any], dict[str, Any]]:
        """The echo."""
        told: dict[str, Any] = {}
        if self._question.echo:
            told["text"] = self._echo(at)
            told["logprobs"] = self._echoed(at, choice) if self._question.logprobs >= 0 else None
        if self._question.token_ids:
            told = {"text": "", **told, "prompt_token_ids": self._prompt_ids(at)}
        return told, {}

    def _whole(self, at: int, choice: _Choice) -> dict[str, Any]:
        text, logprobs = "".join(choice.texts), None
        if self._question.echo:
            text = self._echo(at) + text
        if self._question.logprobs >= 0:
            logprobs = self._echoed(at, choice) if self._question.echo else _no_logprobs()
            for name, values in self._logprobs(choice.logprobs, choice).items():
                logprobs[name] += values
        told: dict[str, Any] = {"text": text, "logprobs": logprobs}
        if self._question.prompt_logprobs >= 0:
            told["prompt_logprobs"] = self._prompt_logprobs(at, self._question.prompt_logprobs)
        if self._question.token_ids:
            told["prompt_token_ids"] = self._prompt_ids(at)
        return told

    def _echo(self, at: int) -> str:
        prompt = self._question.prompts[at]
        if isinstance(prompt, TextPrompt):
            return prompt.text
        return self._tokenizer.decode(self._prompt_ids(at), skip_special_tokens=False)

    def _echoed(self, at: int, choice: _Choice) -> dict[str, Any]:
        accepted = self._asked[at].accepted
        given = accepted.prompt_logprobs if accepted else ()
        text = self._echo(at)
        choice.text_offset = len(text)
        return self._beside_each_other(given, self._echo_offsets(at, text, given))

    def _echo_offsets(self, at: int, text: str, given: Iterable[TokenLogprob]) -> Iterator[int]:
        """Where the tokens of an echo begin in it. A prompt that was a text shows the special tokens that it names
        itself, and none that the tokenizer added; one that was token ids shows them all."""
        texts, is_text = self._tokenizer.texts, isinstance(self._question.prompts[at], TextPrompt)
        shown, offset = texts.stream(skip_special_tokens=is_text), 0
        for one in given:
            yield offset
            name = texts.token_bytes(one.token_id).decode("utf-8", "replace")
            if is_text and one.token_id in texts.special_ids and text.startswith(name, offset):
                offset += len(name)
            else:
                offset += len(shown.push(one.token_id))

    def _accept(self, at: int, event: Accepted) -> None:
        super()._accept(at, event)
        if self._question.logprobs < 0:
            return
        n, options = self._question.n, self._question.options[at]
        for choice in self._choices[at * n : (at + 1) * n]:
            choice.shown = self._tokenizer.texts.stream(
                event.prompt_ids, skip_special_tokens=options.skip_special_tokens, shown=options.shown_token_ids
            )

    def _logprobs(self, given: Iterable[TokenLogprob], choice: _Choice) -> dict[str, Any]:
        return self._beside_each_other(given, self._offsets(given, choice))

    def _offsets(self, given: Iterable[TokenLogprob], choice: _Choice) -> Iterator[int]:
        """Where the tokens of an answer begin in its text. The tokens of one character all begin with it."""
        assert choice.shown is not None
        for one in given:
            yield choice.text_offset
            choice.text_offset += len(choice.shown.push(one.token_id))

    def _beside_each_other(self, given: Iterable[TokenLogprob], offsets: Iterable[int]) -> dict[str, Any]:
        """As lists. Of a prompt's first token there is no logprob."""
        told = _no_logprobs()
        told["text_offset"] += offsets
        for one in given:
            name = self._name(one.token_id)
            told["tokens"].append(name)
            told["token_logprobs"].append(_finite(one.logprob) if one.rank else None)
            told["top_logprobs"].append(self._top(one, name) if one.rank else None)
        return told

    def _top(self, one: TokenLogprob, name: str) -> dict[str, float]:
        """The best, and the token itself if it is not among them."""
        best: dict[str, float] = {}
        for token_id, value, _ in one.top[: self._question.logprobs]:
            best.setdefault(self._name(token_id), _finite(value))
        best.setdefault(name, _finite(one.logprob))
        return best


class ChatTelling(Telling):
    """/v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"
    _text_end = b"}"

    def _start(self, index: int) -> bytes:
        return b'{"index":%d,"delta":{"content":' % index

    def _accept(self, at: int, event: Accepted) -> None:
        """The end of the prompt says whether an answer begins with reasoning."""
        super()._accept(at, event)
        if self._question.parsing is None:
            return
        tail = self._tokenizer.decode(event.prompt_ids[-TAIL_TOKENS:], skip_special_tokens=False)
        for choice in self._choices:
            choice.parser = Parser(self._question.parsing, tail)

    def _piece(self, choice: _Choice, text: str) -> dict[str, Any]:
        if choice.parser is None:
            return {"delta": {"content": text}}
        return {"delta": self._parsed(Message(), choice.parser, text).delta()}

    def _last_piece(self, choice: _Choice, text: str) -> dict[str, Any]:
        if choice.parser is None:
            return {"delta": {"content": text} if text else {}}
        return {"delta": self._parsed(Message(), choice.parser, text, last=True).delta()}

    def _keep(self, choice: _Choice, text: str, *, last: bool = False) -> None:
        if choice.parser is None:
            return super()._keep(choice, text)
        self._parsed(choice.message, choice.parser, text, last=last)

    def _parsed(self, message: Message, parser: Parser, text: str, *, last: bool = False) -> Message:
        """The message, with what the next piece of text adds to it."""
        parts = parser.push(text)
        if last:
            parts += parser.finish()
        return message.add(parts, reasoning=self._question.include_reasoning)

    def _finish(self, choice: _Choice, event: Finished) -> dict[str, Any]:
        told = super()._finish(choice, event)
        called = choice.parser is not None and choice.parser.num_calls and not self._question.called_by_name
        if called and event.reason is FinishReason.STOP:
            told["finish_reason"] = "tool_calls"
        return told

    def _first(self, at: int, choice: _Choice) -> tuple[dict[str, Any], dict[str, Any]]:
        more = {"prompt_token_ids": self._prompt_ids(at)} if self._question.token_ids else {}
        return {"delta": {"role": "assistant", "content": ""}}, more

    def _whole(self, at: int, choice: _Choice) -> dict[str, Any]:
        said = {"content": "".join(choice.texts)} if choice.parser is None else choice.message.whole()
        message = {"role": "assistant", "refusal": None, **said}
        logprobs = self._logprobs(choice.logprobs, choice) if self._question.logprobs >= 0 else None
        return {"message": message, "logprobs": logprobs}

    def _extras(self, whole: bool = False) -> dict[str, Any]:
        extras = super()._extras(whole)
        if whole and self._question.prompt_logprobs >= 0:
            extras["prompt_logprobs"] = self._prompt_logprobs(0, self._question.prompt_logprobs)
        if whole and self._question.token_ids:
            extras["prompt_token_ids"] = self._prompt_ids(0)
        return extras

    def _logprobs(self, given: Iterable[TokenLogprob], choice: _Choice) -> dict[str, Any]:
        return {"content": [self._of_token(one) for one in given], "refusal": None}

    def _of_token(self, one: TokenLogprob) -> dict[str, Any]:
        best = one.top[: self._question.logprobs]
        return {
            **self._entry(one.token_id, one.logprob),
            "top_logprobs": [self._entry(token_id, value) for token_id, value, _ in best],
        }

    def _entry(self, token_id: int, value: float) -> dict[str, Any]:
        token_bytes = self._tokenizer.texts.token_bytes(token_id)
        return {"token": self._name(token_id), "logprob": _finite(value), "bytes": list(token_bytes)}


def timing_of(timing: Timing) -> dict[str, Any]:
    """A Timing in milliseconds, its names with `_ms`."""
    told: dict[str, Any] = {}
    for name, value in msgspec.structs.asdict(timing).items():
        if name.endswith("_ns"):
            told[name[:-3] + "_ms"] = _ms(value)
        else:
            told[name] = value
    return told


def _ms(value_ns: Any) -> Any:
    if isinstance(value_ns, Mapping):
        return {reason: _ms(waited_ns) for reason, waited_ns in value_ns.items()}
    return round(value_ns / NS_PER_MS, 3)


def _says(piece: Mapping[str, Any]) -> bool:
    """Whether a piece of a chunk has anything in it."""
    return any(piece.values())


def _usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _no_logprobs() -> dict[str, Any]:
    return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
