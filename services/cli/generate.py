"""`sluice generate`: one request, streamed to the terminal over gRPC."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from services.cli.connecting import (
    CONNECT_TIMEOUT_S,
    DEFAULT_ADDRESS,
    RETRIES,
    Address,
    CaCerts,
    Certfile,
    Keyfile,
    UseTls,
    api_key,
    tls_of,
)
from services.cli.output import fail_call, fail_field


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; `-` reads standard input.")] = "-",
    address: Address = DEFAULT_ADDRESS,
    tls: UseTls = False,
    ssl_ca_certs: CaCerts = "",
    ssl_certfile: Certfile = "",
    ssl_keyfile: Keyfile = "",
    model: Annotated[str, typer.Option(help="The served model; needed where there are several.")] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's message, through the chat template.")
    ] = False,
    system: Annotated[str, typer.Option(help="A system message, with --chat.")] = "",
    token_ids: Annotated[str, typer.Option(metavar="ID,ID,…", help="A prompt of token ids instead of text.")] = "",
    tools_json: Annotated[str, typer.Option(help="Tools for the chat template, a JSON array.")] = "",
    template_kwargs_json: Annotated[str, typer.Option(help="Further template variables, a JSON object.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off.")] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same request gives the same answer; under load add --deterministic.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    presence_penalty: Annotated[float | None, typer.Option()] = None,
    frequency_penalty: Annotated[float | None, typer.Option()] = None,
    logit_bias: Annotated[list[str] | None, typer.Option(metavar="ID=BIAS", help="May be repeated.")] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Samples.")] = None,
    max_tokens: Annotated[int | None, typer.Option()] = None,
    min_tokens: Annotated[int, typer.Option()] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    stop_token_ids: Annotated[str, typer.Option(metavar="ID,ID,…", help="Tokens that end it.")] = "",
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos")] = False,
    logprobs: Annotated[int | None, typer.Option(help="0: of each token; k: and of the k best.")] = None,
    prompt_logprobs: Annotated[int | None, typer.Option()] = None,
    timing: Annotated[bool, typer.Option("--timing", help="Print the phase table.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Print each event as one line of JSON.")] = False,
    priority: Annotated[int, typer.Option(help="Lower runs first, under --scheduling-policy priority.")] = 0,
    cache_salt: Annotated[str, typer.Option(help="Share cached blocks with requests of the same salt only.")] = "",
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic/--no-deterministic", help="Bit-identical whatever the batch.")
    ] = None,
    request_id: Annotated[str, typer.Option(help="Chosen by the server when empty.")] = "",
    json_object: Annotated[bool, typer.Option("--json-object", help="The answer is a JSON object.")] = False,
    json_schema: Annotated[str, typer.Option(metavar="FILE", help="It follows this JSON schema; `-` reads it.")] = "",
    regex: Annotated[str, typer.Option(help="It matches this expression as a whole.")] = "",
    choice: Annotated[list[str] | None, typer.Option(help="It is one of these; may be repeated.")] = None,
    grammar: Annotated[str, typer.Option(metavar="FILE", help="It follows this Lark or GBNF grammar.")] = "",
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="The request's deadline.")] = None,
) -> None:
    """Stream an answer from a running cluster. Unset options are left to the model's generation_config.

    Exit codes: 0 the answer is whole; 1 the call failed; 2 an option is wrong; 130 interrupted.
    """
    from services.cli.client import Request

    secured = tls_of(tls, ssl_ca_certs, ssl_certfile, ssl_keyfile)
    _require_chat(
        chat, {"--system": system, "--tools-json": tools_json, "--template-kwargs-json": template_kwargs_json}
    )
    try:
        request = Request(
            **_input(prompt, chat=chat, system=system, token_ids=token_ids),
            tools_json=tools_json,
            template_kwargs_json=template_kwargs_json,
            model=model,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=_biases(logit_bias or []),
            n=n,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=tuple(stop or ()),
            stop_token_ids=_ids(stop_token_ids, "--stop-token-ids"),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            include_timing=timing,
            priority=priority,
            cache_salt=cache_salt,
            deterministic=deterministic,
            request_id=request_id,
            structured=_structured(json_object, json_schema, regex, choice, grammar),
        )
        code = asyncio.run(_run(address, secured, request, timeout, json_lines=json_lines))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code = 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    raise typer.Exit(code)


async def _run(address: str, tls: Any, request: Any, timeout_s: float | None, *, json_lines: bool) -> int:
    from services.cli.client import CallError, Client, FieldError

    async with Client(address, api_key=api_key(), tls=tls) as client:
        try:
            await client.connect(CONNECT_TIMEOUT_S)
            return await stream(client, request, timeout_s=timeout_s, json_lines=json_lines)
        except CallError as error:
            fail_call(error)
            return 1
        except FieldError as error:
            fail_field(error)
            return 2


async def stream(client: Any, request: Any, *, timeout_s: float | None = None, json_lines: bool = False) -> int:
    """Prints the answer as it comes, then the phase table where it was asked for. Raises CallError and FieldError."""
    from services.cli.client import Accepted, Delta, Finished

    answer = Answer(request.n or 1)
    encoder = msgspec.json.Encoder()
    try:
        async for event in client.generate(request, timeout_s=timeout_s, retries=RETRIES):
            if json_lines:
                print(encoder.encode(event).decode(), flush=True)
                continue
            match event:
                case Accepted():
                    answer.show_prompt_logprobs(event)
                case Delta():
                    answer.show(event)
                case Finished():
                    answer.finish(event)
    finally:
        answer.end()
    return 0


class Answer:
    """Writes samples to standard output: a single one as it comes, several one after the other as they end. Logprobs
    wait for the end of their sample: they would stand in the middle of its lines."""

    def __init__(self, num_samples: int) -> None:
        self._live = num_samples == 1
        self._open = False
        """A line of the answer has begun."""
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[str]] = {}

    def show_prompt_logprobs(self, accepted: Any) -> None:
        for entry in accepted.prompt_logprobs:
            print(_logprob_line(entry), file=sys.stderr)

    def show(self, delta: Any) -> None:
        if self._live:
            self._open = True
            print(delta.text, end="", flush=True)
        else:
            self._texts.setdefault(delta.index, []).append(delta.text)
        self._logprobs.setdefault(delta.index, []).extend(map(_logprob_line, delta.logprobs))

    def finish(self, finished: Any) -> None:
        if not self._live:
            print(f"── sample {finished.index} ──")
            print("".join(self._texts.pop(finished.index, [])), end="")
        self._open = False
        print(flush=True)
        self._show_logprobs(finished.index)
        if finished.timing and finished.usage:
            from services.cli.timing import phase_table

            print(flush=True)
            Console().print(phase_table(finished.timing, finished.usage))

    def end(self) -> None:
        """After an answer that broke off: what is said next begins on a line of its own."""
        if self._open:
            print(flush=True)
        for index in list(self._logprobs):
            self._show_logprobs(index)

    def _show_logprobs(self, index: int) -> None:
        for line in self._logprobs.pop(index, []):
            print(line, file=sys.stderr)


def _logprob_line(entry: Any) -> str:
    best = "  ".join(f"{top.token.decode(errors='replace')!r} {top.logprob:.3f}" for top in entry.top)
    return f"token {entry.token_id}  logprob {entry.logprob:.4f}  rank {entry.rank}  {best}".rstrip()


def _require_chat(chat: bool, options: dict[str, str]) -> None:
    unused = next((name for name, value in options.items() if value and not chat), None)
    if unused:
        raise typer.BadParameter(f"{unused} is for the chat template; add --chat")


def _input(prompt: str, *, chat: bool, system: str, token_ids: str) -> dict[str, Any]:
    from services.cli.client import Message

    if token_ids:
        if prompt != "-" or chat:
            raise typer.BadParameter("--token-ids is the whole prompt; leave out the text and --chat")
        return {"token_ids": _ids(token_ids, "--token-ids")}
    if prompt == "-" and sys.stdin.isatty():
        print("the prompt, ended by Ctrl-D:", file=sys.stderr)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not chat:
        return {"prompt": text}
    messages = [Message("system", system)] if system else []
    return {"messages": (*messages, Message("user", text))}


def _structured(
    json_object: bool, json_schema: str, regex: str, choice: list[str] | None, grammar: str
) -> tuple[str, str | tuple[str, ...]] | None:
    given: list[tuple[str, str | tuple[str, ...]]] = []
    if json_object:
        given.append(("json_object", ""))
    if json_schema:
        given.append(("json_schema", _read(json_schema, "--json-schema")))
    if regex:
        given.append(("regex", regex))
    if choice:
        given.append(("choice", tuple(choice)))
    if grammar:
        given.append(("grammar", _read(grammar, "--grammar")))
    if len(given) > 1:
        flags = " and ".join("--" + kind.replace("_", "-") for kind, _ in given)
        raise typer.BadParameter(f"{flags} exclude each other")
    return given[0] if given else None


def _read(name: str, flag: str) -> str:
    """A file, or standard input for `-`."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise typer.BadParameter(f"{flag}: cannot read {name}: {error}") from None


def _ids(text: str, flag: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise typer.BadParameter(f"{flag} takes token ids, as in 1,2,3; not {text!r}") from None


def _biases(items: list[str]) -> dict[int, float]:
    try:
        return {int(token): float(bias) for token, _, bias in (item.partition("=") for item in items)}
    except ValueError:
        raise typer.BadParameter(f"--logit-bias takes ID=BIAS, as in 42=-100; not {json.dumps(items)}") from None
