"""The Python client: typed values in, typed values out, for asyncio (Client) and without (BlockingClient).

async with Client("127.0.0.1:50051") as client:
    async for event in client.generate(Request(prompt="def add(a, b):", max_tokens=32), timeout_s=60, retries=2):
        if isinstance(event, Delta):
            print(event.text, end="")

with BlockingClient("127.0.0.1:50051") as client:
    print(client.complete(Request(prompt="def add(a, b):", max_tokens=32), timeout_s=60).text)

A router that speaks TLS is called with tls=Tls(ssl_ca_certs="authority.pem").
"""

from services.cli.client.asynchronous import DEFAULT_ADDRESS, Client
from services.cli.client.blocking import BlockingClient, Stream
from services.cli.client.errors import CallError, FieldError
from services.cli.client.values import (
    Accepted,
    Answer,
    Delta,
    Event,
    Finished,
    GroupLoad,
    Load,
    Logprobs,
    Message,
    Model,
    Request,
    ServerInfo,
    Timing,
    TopLogprob,
    Trace,
    TraceSpan,
    Usage,
)
from shared.net.tls import Tls

__all__ = [
    "DEFAULT_ADDRESS",
    "Accepted",
    "Answer",
    "BlockingClient",
    "CallError",
    "Client",
    "Delta",
    "Event",
    "FieldError",
    "Finished",
    "GroupLoad",
    "Load",
    "Logprobs",
    "Message",
    "Model",
    "Request",
    "ServerInfo",
    "Stream",
    "Timing",
    "Tls",
    "TopLogprob",
    "Trace",
    "TraceSpan",
    "Usage",
]
