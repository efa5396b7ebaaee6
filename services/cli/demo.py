"""`sluice demo`: a cluster on free ports, one streamed answer, its phase table; what ops/scripts/demo runs."""

import asyncio
from typing import Annotated, Any

import typer
from rich.console import Console

from services.cli.cluster import Cluster, up_flags
from services.cli.connecting import CONNECT_TIMEOUT_S
from services.cli.flags import with_flags
from services.cli.generate import stream
from services.cli.output import fail_call
from services.cli.up import LogFile, start

PROMPT = 'def read_lines(path):\n    """Return the lines of a text file."""\n    with open(path'
SETTINGS: dict[str, Any] = {"max_tokens": 96, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3}
"""A seed, so that everybody sees the same answer; some warmth, because a model this small repeats itself greedily."""

PLAIN: dict[str, Any] = {"ssl_certfile": "", "ssl_keyfile": "", "ssl_ca_certs": ""}
"""It calls a router of its own, on free ports: without TLS, whatever files and variables say."""

Keep = Annotated[bool, typer.Option("--keep", help="Leave the cluster up, and say how to call it.")]
Prompt = Annotated[str, typer.Option("--prompt", help="What to ask.")]


def add_demo(app: typer.Typer) -> None:
    """Adds `sluice demo` with the flags of all services."""
    app.command("demo")(with_flags(demo, [flag for flag in up_flags() if flag.name not in PLAIN]))


def demo(
    keep: Keep = False, prompt: Prompt = PROMPT, log_file: LogFile = "/dev/null", *, flags: dict[str, Any]
) -> None:
    """Start a cluster on free ports, stream one answer, show where its time went, and stop (or stay, with --keep)."""

    async def show(cluster: Cluster) -> int:
        code = await _ask(cluster, prompt)
        if keep and code == 0:
            print_calls(cluster.router, cluster.http["router"])
            await asyncio.Event().wait()
        return code

    raise typer.Exit(start({"grpc_port": 0, **flags, **PLAIN}, log_file=log_file, meanwhile=show))


async def _ask(cluster: Cluster, prompt: str) -> int:
    from services.cli.client import CallError, Client, Request

    console = Console(highlight=False)
    console.print()
    console.print(prompt, style="dim", end="", markup=False)
    request = Request(prompt=prompt, include_timing=True, **SETTINGS)
    async with Client(cluster.router) as client:
        try:
            await client.connect(CONNECT_TIMEOUT_S)
            return await stream(client, request)
        except CallError as error:
            fail_call(error)
            return 1


def print_calls(address: str, http: str) -> None:
    """Ways to call a router by either door."""
    print(
        f"""
The cluster is up, with a page to talk to the model at http://{http}/ . Call it from another terminal:

  .venv/bin/sluice generate --address {address} --timing 'def add(a, b):'
  .venv/bin/sluice chat --address {address}

  curl http://{http}/v1/completions -H 'content-type: application/json' \\
    -d '{{"prompt": "def add(a, b):", "max_tokens": 32}}'

  grpcurl -plaintext -d '{{"prompt": "def add(a, b):", "stopping": {{"max_tokens": 32}}}}' \\
    {address} sluice.v1.Inference/Generate

  .venv/bin/python - <<'EOF'
  from services.cli.client import BlockingClient, Delta, Request
  with BlockingClient("{address}") as client:
      for event in client.generate(Request(prompt="def add(a, b):", max_tokens=32)):
          if isinstance(event, Delta):
              print(event.text, end="", flush=True)
  EOF

Ctrl-C stops it.""",
        flush=True,
    )
