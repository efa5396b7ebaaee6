"""`sluice generate`, `sluice chat` and their client, against a pretend router."""

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.client import Accepted, CallError, Client, Delta, Finished, Message, Request, Usage
from services.cli.client.wire import plainly
from services.cli.timing import PHASES, figures
from shared.rpc.sluice.v1 import inference_pb2 as pb
from tests.cli.fake_router import FakeRouter, Served, serve
from tests.cli.test_flags import flags_in_help, sluice


@pytest.fixture
def served() -> Iterator[Served]:
    with Served(FakeRouter()) as running:
        yield running


def generate(served: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    return sluice("generate", f"--address={served.address}", *arguments)


def test_the_answer_is_printed_as_text(served: Served) -> None:
    done = generate(served, "hi")
    assert (done.returncode, done.stdout) == (0, "Hello, wörld\n")


def test_timing_prints_every_phase_and_the_figures(served: Served) -> None:
    out = generate(served, "hi", "--timing").stdout
    for word in (*PHASES, "total", "TTFT", "TPOT", "tokens/s", "waited for blocks 4.00", "preempted 1×"):
        assert word in out
    assert "39.00 ms" in out
    assert "30.00 ms" in out  # 60 ms of decode over two tokens after the first
    assert "4 in (2 cached), 3 out" in out


def test_json_prints_one_event_per_line(served: Served) -> None:
    events = [json.loads(line) for line in generate(served, "hi", "--json").stdout.splitlines()]
    assert [event["type"] for event in events] == ["Accepted", "Delta", "Delta", "Delta", "Finished"]
    assert events[-1]["reason"] == "stop"
    assert events[-1]["usage"]["completion_tokens"] == 3


def test_several_samples_are_printed_one_after_the_other(served: Served) -> None:
    assert generate(served, "hi", "-n", "2").stdout == "── sample 0 ──\nHello, wörld\n── sample 1 ──\nHello, wörld\n"


def test_a_prompt_can_come_from_standard_input(served: Served) -> None:
    command = [sys.executable, "-m", "services.cli.main", "generate", f"--address={served.address}"]
    subprocess.run(command, input="from a pipe", text=True, capture_output=True, check=True)
    assert served.router.requests[0].prompt == "from a pipe"


def test_a_reader_that_has_seen_enough_is_no_error(served: Served) -> None:
    served.router.answer = ("many words ",) * 20_000
    command = [sys.executable, "-m", "services.cli.main", "generate", f"--address={served.address}", "hi"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        process.stdout.read(100)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.wait(20) == 141


def test_a_refusal_is_one_sentence_with_its_status_and_when_to_try_again(served: Served) -> None:
    done = generate(served, "refuse")
    assert done.returncode == 1
    assert done.stderr == "error: RESOURCE_EXHAUSTED: 512 requests are waiting (try again in 0.1 s)\n"


def test_a_router_without_tls_is_told_of_in_one_line(served: Served) -> None:
    done = generate(served, "hi", "--tls")
    assert done.returncode == 1
    assert done.stderr.startswith("error: UNAVAILABLE: nothing that we trust") and done.stderr.count("\n") == 1


def test_a_refused_field_is_named(served: Served) -> None:
    assert "(field sampling.top_p)" in generate(served, "hi", "--top-p", "2").stderr


def test_nobody_there_says_so() -> None:
    done = sluice("generate", "--address=127.0.0.1:1", "hi")
    assert done.returncode == 1
    assert "nothing answers gRPC at 127.0.0.1:1; is `sluice up` running" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--seed", "--max-tokens", "--stop-token-ids", "--token-ids", "-n"])
def test_a_value_beyond_its_field_is_a_sentence_that_names_the_option(served: Served, option: str) -> None:
    done = generate(served, *(() if option == "--token-ids" else ("hi",)), option, "-1")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {option.replace('-n', '--n')} does not fit its field: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--system", "--tools-json", "--template-kwargs-json"])
def test_an_option_of_the_chat_template_needs_a_chat(served: Served, option: str) -> None:
    done = generate(served, "hi", option, "[]")
    assert done.returncode == 2
    assert f"{option} is for the chat template; add --chat" in done.stderr
    assert not served.router.requests


def test_logprobs_stand_on_lines_of_their_own(served: Served) -> None:
    line = "token 9  logprob -0.5000  rank 1\n"
    command = [sys.executable, "-m", "services.cli.main", "generate", f"--address={served.address}", "--logprobs=0"]

    def both(*more: str) -> str:
        """As a terminal shows them."""
        return subprocess.run([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    assert both("hi") == "Hello, wörld\n" + 3 * line
    assert both("hi", "-n2") == "".join(f"── sample {i} ──\nHello, wörld\n" + 3 * line for i in (0, 1))
    assert both("break").startswith("Hello, wörld\n" + 3 * line + "error: RESOURCE_EXHAUSTED")


@pytest.mark.parametrize("more", ["hi", "--chat"])
def test_token_ids_are_the_whole_prompt(served: Served, more: str) -> None:
    done = generate(served, "--token-ids", "1,2", more)
    assert done.returncode == 2 and "--token-ids is the whole prompt" in done.stderr
    assert not served.router.requests


@pytest.mark.parametrize("bad", [("--logit-bias", "x=1"), ("--stop-token-ids", "a,b"), ("--token-ids", "1,x")])
def test_a_malformed_option_is_named(served: Served, bad: tuple[str, str]) -> None:
    done = generate(served, "hi", *bad)
    assert done.returncode == 2
    assert bad[0] in done.stderr


def test_every_field_of_the_request_has_an_option() -> None:
    shown = flags_in_help("generate")
    renamed = {"prompt": None, "chat": "--chat", "token_ids": "--token-ids", "include_timing": "--timing", "n": "--n"}
    messages = (pb.GenerateRequest, pb.Sampling, pb.Stopping, pb.ResponseOptions, pb.Chat)
    for message in messages:
        for field in message.DESCRIPTOR.fields:
            if field.message_type in (None, *(m.DESCRIPTOR for m in (pb.TokenIds, pb.Chat))) or field.name in renamed:
                option = renamed.get(field.name, "--" + field.name.replace("_", "-"))
                assert option is None or option in shown, f"{message.DESCRIPTOR.name}.{field.name}"


def test_every_option_arrives_in_its_field(served: Served) -> None:
    # fmt: off
    generate(
        served, "hi", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "5", "--min-p", "0.25", "--seed", "3",
        "--repetition-penalty", "1.5", "--presence-penalty", "0.5", "--frequency-penalty", "-0.5",
        "--logit-bias", "4=-100", "--logit-bias", "5=2.5", "-n", "2", "--max-tokens", "9", "--min-tokens", "2",
        "--stop", "a", "--stop", "b", "--stop-token-ids", "1,2", "--ignore-eos", "--logprobs", "0",
        "--prompt-logprobs", "2", "--timing", "--priority", "-3", "--deterministic", "--request-id", "mine",
        "--model", "twin",
    )
    # fmt: on
    expected = pb.GenerateRequest(
        request_id="mine",
        model="twin",
        prompt="hi",
        sampling=pb.Sampling(
            temperature=0.5,
            top_p=0.9,
            top_k=5,
            min_p=0.25,
            seed=3,
            repetition_penalty=1.5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={4: -100, 5: 2.5},
            n=2,
        ),
        stopping=pb.Stopping(max_tokens=9, min_tokens=2, stop=["a", "b"], stop_token_ids=[1, 2], ignore_eos=True),
        response=pb.ResponseOptions(logprobs=0, prompt_logprobs=2, include_timing=True),
        priority=-3,
        deterministic=True,
    )
    assert served.router.requests[0] == expected


def test_each_structure_arrives_in_its_field_and_two_exclude_each_other(served: Served, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    given = {
        ("--json-object",): pb.Structured(json_object=True),
        ("--json-schema", str(schema)): pb.Structured(json_schema='{"type": "object"}'),
        ("--regex", "a+"): pb.Structured(regex="a+"),
        ("--choice", "a", "--choice", "b c"): pb.Structured(choice=pb.Choice(options=["a", "b c"])),
        ("--grammar", str(schema)): pb.Structured(grammar='{"type": "object"}'),
    }
    for options, expected in given.items():
        generate(served, "hi", *options)
        assert served.router.requests[-1].structured == expected
    done = generate(served, "hi", "--regex", "a", "--json-object")
    assert done.returncode == 2 and "exclude each other" in done.stderr
    done = generate(served, "hi", "--json-schema", str(tmp_path / "none"))
    assert done.returncode == 2 and "--json-schema" in done.stderr


def test_unset_options_stay_unset(served: Served) -> None:
    generate(served, "hi")
    sampling = served.router.requests[0].sampling
    assert not [field.name for field, _ in sampling.ListFields()]
    assert not served.router.requests[0].HasField("deterministic")


def test_a_chat_prompt_and_token_ids_are_inputs_too(served: Served) -> None:
    generate(served, "hi", "--chat", "--system", "be brief")
    generate(served, "--token-ids", "1,2,3")
    chat, ids = served.router.requests
    assert [(m.role, m.content) for m in chat.chat.messages] == [("system", "be brief"), ("user", "hi")]
    assert list(ids.token_ids.ids) == [1, 2, 3]


def test_the_client_speaks_values_in_both_directions() -> None:
    async def scenario() -> None:
        server, address = await serve(FakeRouter())
        async with Client(address) as client:
            await client.connect(5)
            events = [event async for event in client.generate(Request(prompt="hi"))]
            assert isinstance(events[0], Accepted)
            assert [e.text for e in events if isinstance(e, Delta)] == ["Hello", ", ", "wörld"]
            assert events[-1] == Finished(0, "stop", ".", Usage(4, 3, 2))
            assert (await client.list_models())[0].name == "twin"
            assert await client.abort("req-1")
            assert not await client.abort("req-2")
            assert (await client.server_info()).service == "router"
            (group,) = (await client.load()).groups
            assert group.kv_blocks_free + group.kv_blocks_cached == group.kv_blocks_total
            assert await client.drain() == 3
        await server.stop(0)

    asyncio.run(scenario())


def test_leaving_the_iteration_cancels_the_call() -> None:
    async def scenario() -> int:
        router = FakeRouter()
        server, address = await serve(router)
        async with Client(address) as client:
            stream = client.generate(Request(prompt="hang"))
            async for event in stream:
                if isinstance(event, Delta):
                    break
            await stream.aclose()
            for _ in range(100):
                if router.cancelled:
                    break
                await asyncio.sleep(0.02)
        await server.stop(0)
        return router.cancelled

    assert asyncio.run(scenario()) == 1


def test_a_deadline_ends_as_a_call_error() -> None:
    async def scenario() -> str:
        server, address = await serve(FakeRouter())
        try:
            async with Client(address) as client:
                request = Request(messages=(Message("user", "hang"),))
                return str([event async for event in client.generate(request, timeout_s=0.3)])
        except CallError as error:
            return error.status
        finally:
            await server.stop(0)

    assert asyncio.run(scenario()) == "DEADLINE_EXCEEDED"


def test_one_token_has_no_time_per_output_token() -> None:
    from tests.cli.fake_router import TIMING

    timing = _as_timing(TIMING)
    assert "TPOT" not in dict(figures(timing, Usage(4, 1, 0)))


def _as_timing(wire: pb.Timing):
    from services.cli.client import Timing

    return Timing(**{name: getattr(wire, name) for name in Timing.__struct_fields__})


class Terminal:
    """`sluice chat` on a terminal of its own."""

    def __init__(self, address: str) -> None:
        self._fd, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.cli.main", "chat", f"--address={address}"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self._seen = b""

    def type(self, line: str) -> None:
        os.write(self._fd, line.encode() + b"\n")

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def until(self, words: str, timeout_s: float = 20) -> None:
        """Reads on until `words` have been shown; what stood before them is forgotten."""
        deadline = time.monotonic() + timeout_s
        while words.encode() not in self._seen:
            assert time.monotonic() < deadline, f"{words!r} did not come: {self._seen.decode(errors='replace')!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self._seen += os.read(self._fd, 4096)
        self._seen = self._seen.partition(words.encode())[2]

    def end(self) -> int:
        try:
            return self._process.wait(20)
        finally:
            os.close(self._fd)


def test_a_chat_keeps_its_history_and_reset_forgets_it(served: Served) -> None:
    terminal = Terminal(served.address)
    terminal.until("› ")
    for line in ("one", "two"):
        terminal.type(line)
        terminal.until("wörld")
        terminal.until("› ")
    terminal.type("/reset")
    terminal.until("forgotten")
    terminal.type("three")
    terminal.until("wörld")
    terminal.type("/timing")
    terminal.until("TTFT")
    terminal.type("/exit")
    assert terminal.end() == 0
    histories = [[m.content for m in request.chat.messages] for request in served.router.requests]
    assert histories == [["one"], ["one", "Hello, wörld", "two"], ["three"]]


def test_ctrl_c_ends_the_answer_and_keeps_the_conversation(served: Served) -> None:
    terminal = Terminal(served.address)
    terminal.until("› ")
    terminal.type("hang")
    terminal.until("wörld")
    terminal.interrupt()
    terminal.until("(ended)")
    terminal.type("again")
    terminal.until("wörld")
    terminal.until("› ")
    terminal.type("/exit")
    assert terminal.end() == 0
    assert served.router.cancelled == 1
    assert [m.content for m in served.router.requests[1].chat.messages] == ["hang", "Hello, wörld", "again"]


def test_a_chat_says_why_there_is_no_timing(served: Served) -> None:
    terminal = Terminal(served.address)
    terminal.until("› ")
    terminal.type("/timing")
    terminal.until("no answer yet")
    terminal.type("whole")
    terminal.until("wörld")
    terminal.until("› ")
    terminal.type("hang")
    terminal.until("wörld")
    terminal.interrupt()
    terminal.until("(ended)")
    terminal.type("/timing")
    terminal.until("you ended the last answer")
    terminal.type("break")
    terminal.until("wörld\r\n\x1b[31merror:\x1b[0m RESOURCE_EXHAUSTED")
    terminal.type("/timing")
    terminal.until("the last answer failed")
    terminal.type("/exit")
    assert terminal.end() == 0


def test_a_chat_names_an_option_that_does_not_fit(served: Served) -> None:
    command = [sys.executable, "-m", "services.cli.main", "chat", f"--address={served.address}", "--max-tokens=-1"]
    done = subprocess.run(command, input="hi\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "error: --max-tokens does not fit its field" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_a_chat_template_is_a_clear_message() -> None:
    with Served(FakeRouter(has_chat_template=False)) as served:
        done = sluice("chat", f"--address={served.address}")
    assert done.returncode == 1
    assert "the model 'twin' has no chat template; use `sluice generate`" in done.stderr


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:9: refused", "sluice up"),
        (
            "failed to connect to all addresses; … (Trying to connect an http1.x server (HTTP status 400))",
            "--grpc-port",
        ),
        ("Stream removed (Socket closed)", "broke off"),
        ("Deadline Exceeded", "the deadline passed"),
        ("Stream removed (Deadline Exceeded)", "the deadline passed"),
        ("SERVER: Received message larger than max (9000010 vs. 8454144)", "--max-request-bytes"),
        ("what we do not know is passed on", "what we do not know is passed on"),
    ],
)
def test_what_a_channel_met_is_said_in_plain_words(said, shown):
    assert shown in plainly(said)
