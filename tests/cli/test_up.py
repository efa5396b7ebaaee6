"""What `sluice up` shows, and what happens once it cannot: with a pretend service as a real process."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_flags import sluice

FAKE = str(Path(__file__).with_name("fake_service.py"))
MORE_THAN_A_PIPE = 600
"""Lines of a thousand bytes: a pipe and a reader's buffer hold less."""


class Up:
    """`sluice up` over one pretend worker that plays `play`."""

    def __init__(self, folder: Path, play: str, *, log_file: str = "", ready_file: str = "") -> None:
        self.runs = folder / "runs"
        program = f"""
            import sys
            from services.cli import up
            from services.cli.cluster import Cluster
            from services.cli.supervise import ServiceSpec
            argv = (sys.executable, {FAKE!r}, {"--play=" + play!r}, "--runs={self.runs}", "--name=w")
            spec = ServiceSpec(name="worker-0", argv=argv)
            http = {{"router": "h"}}
            cluster = Cluster(router="r", scheduler="s", workers=("w",), http=http, specs=(spec,), model="m")
            up.plan_cluster = lambda flags, file: cluster
            sys.exit(up.start({{}}, log_file={log_file!r}, ready_file={ready_file!r}))
        """
        command = [sys.executable, "-c", textwrap.dedent(program)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.stderr = self.process.stderr
        self._limit = threading.Timer(30, self.process.kill)
        self._limit.start()

    def until_ready(self) -> list[str]:
        """The lines up to the ready one."""
        said: list[str] = []
        for line in self.stderr:
            said.append(line)
            if "sluice is ready" in line:
                return said
        raise AssertionError("".join(said))

    def until_noted(self) -> None:
        wait_until(lambda: "w note" in self.runs.read_text(), "the service stands still")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def __enter__(self) -> "Up":
        return self

    def __exit__(self, *_: object) -> None:
        self._limit.cancel()
        self.process.kill()
        self.process.wait()
        self.stderr.close()


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def test_services_go_on_when_nobody_reads_their_lines_any_more(tmp_path: Path) -> None:
    with Up(tmp_path, f"ready sleep:0.5 fill:{MORE_THAN_A_PIPE} note wait") as up:
        up.until_ready()
        up.stderr.close()
        up.until_noted()
        assert up.stop() == 0
    assert "w stop" in up.runs.read_text()


def test_a_restart_is_survived_without_a_reader(tmp_path: Path) -> None:
    with Up(tmp_path, "ready sleep:0.5 crash; ready note wait") as up:
        up.until_ready()
        up.stderr.close()
        up.until_noted()
        assert up.stop() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_services_go_on_when_the_disk_of_the_log_file_is_full(tmp_path: Path) -> None:
    with Up(tmp_path, f"ready sleep:0.2 fill:{MORE_THAN_A_PIPE} note wait", log_file="/dev/full") as up:
        up.until_ready()
        assert "cannot write --log-file any more" in up.stderr.readline()
        up.stderr.close()
        up.until_noted()
        assert up.stop() == 0


def test_the_ready_file_says_where_and_goes_with_the_cluster(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    with Up(tmp_path, "ready wait", ready_file=str(ready)) as up:
        up.until_ready()
        wait_until(ready.exists, "no ready file")
        assert json.loads(ready.read_text())["router"] == "r"
        assert up.stop() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.parametrize("place", ["nowhere/ready", "."])
def test_a_ready_file_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path, place: str) -> None:
    ready = tmp_path / place
    done = sluice("up", "--grpc-port=0", f"--ready-file={ready}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot write --ready-file {ready}: ")
    assert done.stderr.count("\n") == 1
