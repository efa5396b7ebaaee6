"""compose.yaml for real: build, up, scale, generate, read the trace back, kill a worker, see it come back, down.

    python -m ops.docker.exercise [--compose docker-compose] [--keep]      what ops/scripts/compose-test runs

Needs a container engine (`docker info` answers) and docker compose. Says what it found at each step; exits with 0 when
all of it held. Where no registry can be reached, an image called python:3.11-slim and a wheel of torch in
ops/docker/wheels will do: ops/docker/README.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "sluice-exercise"
TIMEOUT_S = 240
SINK = """
import json, sys, threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer, add_TraceServiceServicer_to_server)
spans = []
class Sink(TraceServiceServicer):
    def Export(self, request, context):
        for resource in request.resource_spans:
            facts = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    spans.append({"service": facts["service.name"], "name": span.name, "trace": span.trace_id.hex(),
                        "span": span.span_id.hex(), "parent": span.parent_span_id.hex(),
                        "ns": span.end_time_unix_nano - span.start_time_unix_nano})
        return pb.ExportTraceServiceResponse()
class Http(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(spans).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
server = grpc.server(futures.ThreadPoolExecutor(2))
add_TraceServiceServicer_to_server(Sink(), server)
server.add_insecure_port("0.0.0.0:4317")
server.start()
ThreadingHTTPServer(("0.0.0.0", 16686), Http).serve_forever()
"""
OVERRIDE = {
    "services": {
        # A collector from our own image in Jaeger's place: nothing is pulled, and its spans can be asserted.
        "sink": {
            "image": "sluice:dev",
            "entrypoint": ["python", "-c", SINK],
            "networks": {"default": {"aliases": ["jaeger"]}},
        }
    }
}
WITHIN_PERCENT = 1


class Exercise:
    """One run. Every step raises AssertionError or CalledProcessError with what was seen."""

    def __init__(self, compose: list[str], override: Path) -> None:
        self._compose = [*compose, "-p", PROJECT, "-f", str(ROOT / "compose.yaml"), "-f", str(override)]

    def compose(self, *arguments: str, timeout_s: float = 1800) -> str:
        command = [*self._compose, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        return done.stdout

    def inside(self, service: str, *command: str, timeout_s: float = 120) -> str:
        """A command in a service's container: the engine's ports may lie in a network namespace of their own."""
        return self.compose("exec", "-T", service, *command, timeout_s=timeout_s)

    def build(self) -> str:
        self.compose("build")
        size = _docker("image", "inspect", "sluice:dev", "--format", "{{.Size}}")
        return f"{int(size) / 1e6:.0f} MB"

    def up(self) -> str:
        self.compose("up", "-d", "--wait", "--wait-timeout", str(TIMEOUT_S))
        return ", ".join(sorted(one["Service"] for one in self.containers()))

    def containers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.compose("ps", "--format", "json").splitlines()]

    def is_hardened(self) -> str:
        """Not root, no capability, nothing to write to but /tmp."""
        code = (
            "import os, pathlib; status = pathlib.Path('/proc/self/status').read_text()\n"
            "caps = [line for line in status.splitlines() if line.startswith('CapEff')][0].split()[1]\n"
            "assert os.getuid() == 10001 and int(caps, 16) == 0, (os.getuid(), caps)\n"
            "assert not os.access('/app', os.W_OK) and not os.access('/', os.W_OK)"
        )
        for service in ("router", "scheduler", "worker"):
            self.inside(service, "python", "-c", code)
        return "uid 10001, no capabilities, read-only"

    def scale(self) -> str:
        self.compose("up", "-d", "--wait", "--wait-timeout", str(TIMEOUT_S), "--scale", "worker=2", "--no-recreate")
        wait_for(lambda: self.groups() == 2, "two workers are registered")
        return "2 workers"

    def groups(self) -> int:
        """Worker groups that the router sees."""
        code = (
            "import asyncio\nfrom services.cli.client import Client\n"
            "async def ask():\n"
            "    async with Client('127.0.0.1:50051') as client:\n"
            "        print(len((await client.load()).groups))\n"
            "asyncio.run(ask())"
        )
        return int(self.inside("router", "python", "-c", code))

    def generate(self) -> str:
        """From outside, through the published port: a container on the engine's own network is where a user is."""
        outside = ["run", "--rm", "--network", "host", "--entrypoint", "sluice", "sluice:dev"]
        arguments = ["generate", "--address", "127.0.0.1:50051", "--max-tokens", "24", "--temperature", "0"]
        answer = _docker(*outside, *arguments, "def add(a, b):", timeout_s=120)
        assert answer, "an answer has text"
        return repr(answer[:50])

    def trace(self) -> str:
        """What the collector got of the request adds up and has both services' spans."""
        read = "import urllib.request as u; print(u.urlopen('http://jaeger:16686').read().decode())"
        found: list[dict[str, Any]] = []

        def arrived() -> bool:
            found[:] = json.loads(self.inside("scheduler", "python", "-c", read))
            return any(span["name"] == "generate" for span in found)

        wait_for(arrived, "the collector has a trace", pause_s=1)
        root = next(span for span in found if span["name"] == "generate")
        spans = [span for span in found if span["trace"] == root["trace"]]
        assert {span["service"] for span in spans} == {"sluice-router", "sluice-scheduler"}, spans
        inner = sum(span["ns"] for span in spans if span["parent"] == root["span"])
        assert abs(inner - root["ns"]) <= max(root["ns"] * WITHIN_PERCENT / 100, 500_000), spans
        return f"{len(spans)} spans, {root['ns'] / 1e6:.1f} ms"

    def kill(self) -> str:
        """A worker's process dies as the kernel would have it; the cluster answers, and the worker comes back."""
        victim = next(one for one in self.containers() if one["Service"] == "worker")
        pid = int(_docker("inspect", "--format", "{{.State.Pid}}", victim["ID"]))
        os.kill(pid, 9)
        began = time.monotonic()
        self.generate()
        wait_for(lambda: _is_again(victim["ID"], pid), "the killed worker runs again")
        wait_for(lambda: self.groups() == 2, "both workers are registered again", timeout_s=TIMEOUT_S)
        return f"both workers again after {time.monotonic() - began:.0f} s"

    def down(self) -> str:
        self.compose("down", "-v", "--timeout", "45")
        assert not _docker("ps", "-aq", "--filter", f"label=com.docker.compose.project={PROJECT}")
        return "nothing left"


def _is_again(container: str, old_pid: int) -> bool:
    state = json.loads(_docker("inspect", "--format", "{{json .State}}", container))
    return bool(state["Running"]) and state["Pid"] not in (0, old_pid)


def _docker(*arguments: str, timeout_s: float = 60) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"docker {' '.join(arguments)}:\n{done.stderr[-2000:]}"
    return done.stdout.strip()


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 90, pause_s: float = 0.5) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except (AssertionError, subprocess.SubprocessError, ValueError):
            pass  # what is being waited for may not answer yet
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(pause_s)


def find_compose(asked: str) -> list[str] | None:
    """The command of Compose, or None."""
    if asked:
        return asked.split()
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True) if shutil.which("docker") else None
    if plugin is not None and plugin.returncode == 0:
        return ["docker", "compose"]
    found = shutil.which("docker-compose")
    return [found] if found else None


def missing(compose: list[str] | None) -> str:
    """Why it cannot be done here; empty if it can."""
    if not shutil.which("docker"):
        return "docker is not installed"
    if subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        return "no container engine answers (`docker info`)"
    return "" if compose else "docker compose is not installed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compose", default="", help="the command of Compose, where it is not found by itself")
    parser.add_argument("--keep", action="store_true", help="leave the cluster up at the end, or where it failed")
    options = parser.parse_args()
    compose = find_compose(options.compose)
    if reason := missing(compose):
        print(f"skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        override = Path(folder) / "override.yaml"
        override.write_text(json.dumps(OVERRIDE).replace("$", "$$"))  # JSON is YAML
        run = Exercise(compose or [], override)
        steps = (run.build, run.up, run.is_hardened, run.scale, run.generate, run.trace, run.kill)
        try:
            for step in steps:
                began = time.monotonic()
                said = step()
                print(f"{step.__name__:12} {time.monotonic() - began:6.1f} s  {said}", flush=True)
        finally:
            if not options.keep:
                print(f"{'down':12}           {run.down()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
