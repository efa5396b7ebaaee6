"""A pretend service for the supervisor's tests: plays a script of steps, one list of steps per run.

fake_service.py --play "ready exit:1; ready wait" --runs FILE --event-fd=N --parent-pid=P
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from services.cli.events import die_with, write_events


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--play", "--runs", "--name"):
        parser.add_argument(name, default="")
    for name in ("--event-fd", "--parent-pid"):
        parser.add_argument(name, type=int, required=True)
    given = parser.parse_args()
    die_with(given.parent_pid)
    signal.signal(signal.SIGTERM, lambda *_: leave(given))
    runs = Path(given.runs)
    with runs.open("a") as log:
        log.write(f"{given.name} start {os.getpid()}\n")
    started = sum(line.startswith(f"{given.name} start") for line in runs.read_text().splitlines())
    scripts = given.play.split(";")
    for step in scripts[min(started, len(scripts)) - 1].split():
        if step == "note":
            with runs.open("a") as log:
                log.write(f"{given.name} note\n")
            continue
        play(step, write_events(given.event_fd))


def leave(given: argparse.Namespace) -> None:
    with Path(given.runs).open("a") as log:
        log.write(f"{given.name} stop\n")
    sys.exit(0)


def play(step: str, on_event) -> None:
    verb, _, value = step.partition(":")
    match verb:
        case "ready":
            on_event("ready", {"address": "127.0.0.1:1"})
        case "alive":
            on_event("alive", {})
        case "load":
            on_event("loading", {"done_bytes": 5, "total_bytes": 10})
        case "refuse":
            on_event("refused", {"message": value.replace("_", " ")})
        case "print":
            print(value, flush=True)
        case "fill":
            for _ in range(int(value)):
                print("x" * 1000, flush=True)
        case "sleep":
            time.sleep(float(value))
        case "exit":
            sys.exit(int(value))
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "wait":
            while True:
                time.sleep(60)


if __name__ == "__main__":
    main()
