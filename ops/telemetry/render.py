"""The dashboard as a picture: every panel's own queries, answered by a Prometheus that watched a real cluster.

    python -m ops.telemetry.render [--seconds 100]        writes ops/pictures/dashboard.png

Needs `prometheus` (Debian has it) and matplotlib. Grafana draws the same queries with more comfort; this is for places
where it cannot be had, and says which panels had nothing to say. The load: a crowd that a small KV pool cannot hold at
once, clients that leave, requests that are refused, and a worker that is killed halfway.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ops.bench.cluster import Cluster
from services.cli.client import CallError, Client, Request

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = Path(__file__).with_name("grafana") / "dashboards" / "sluice.json"
PICTURE = ROOT / "ops" / "pictures" / "dashboard.png"
FLAGS = ["--workers=2", "--threads=1", "--num-gpu-blocks-override=24", "--max-num-queued-reqs=10"]
SCRAPE_S = 1
RATE_WINDOW = "10s"
"""What Grafana would put for $__rate_interval: at least four scrapes."""
STREAMS = 14
UNITS = {"s": "seconds", "reqps": "requests/s", "ops": "per second", "percentunit": "share", "flops": "FLOP/s"}
JOBS = {"router": ["router"], "scheduler": ["scheduler"], "worker": ["worker-0", "worker-1"]}
COLUMNS = 3


@contextlib.contextmanager
def prometheus(http: dict[str, str], folder: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes a cluster's services."""
    scrapes = [
        {"job_name": job, "static_configs": [{"targets": [http[name] for name in names]}]}
        for job, names in JOBS.items()
    ]
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"},
        "scrape_configs": scrapes,
    }
    (folder / "prometheus.yaml").write_text(json.dumps(config))  # JSON is YAML
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    files = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    command = ["prometheus", *files, f"--web.listen-address={address}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield address
    finally:
        process.terminate()
        process.wait(30)


async def load(address: str, seconds: float, worker_pid: int) -> None:
    """Streams that come and go, for so long; the worker dies halfway."""
    ends = time.monotonic() + seconds
    rng = random.Random(1)
    shared = "def parse_header(line):\n    name, _, value = line.partition(':')\n" * 4

    async def stream(client: Client, number: int) -> None:
        while time.monotonic() < ends:
            prompt = (shared if number % 2 else "") + f"def f{rng.randrange(10**6)}(x):\n"
            request = Request(prompt=prompt, max_tokens=rng.randrange(40, 240), ignore_eos=True)
            with contextlib.suppress(CallError):
                async with contextlib.aclosing(client.generate(request)) as events:
                    async for _ in events:
                        if rng.random() < 0.001:
                            break  # its client leaves
            if rng.random() < 0.05:
                with contextlib.suppress(CallError):
                    async for _ in client.generate(Request(prompt="x", max_tokens=10**6)):
                        pass
            await asyncio.sleep(rng.expovariate(4))

    async with Client(address) as client:
        streams = [asyncio.create_task(stream(client, number)) for number in range(STREAMS)]
        await asyncio.sleep(seconds / 2)
        os.kill(worker_pid, signal.SIGKILL)
        await asyncio.gather(*streams)


def ask(address: str, query: str, start: float, end: float) -> list[dict[str, Any]]:
    """The series of a query, second by second."""
    query = query.replace("$__rate_interval", RATE_WINDOW)
    asked = urllib.parse.urlencode({"query": query, "start": start, "end": end, "step": SCRAPE_S})
    with urllib.request.urlopen(f"http://{address}/api/v1/query_range?{asked}") as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def legend(template: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace("{{" + name + "}}", value)
    return template


def draw(address: str, start: float, end: float, to: Path) -> list[str]:
    """Writes the picture; returns the titles of the panels that had nothing to show."""
    from matplotlib import pyplot
    from PIL import Image

    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] == "timeseries"]
    lines = -(-len(panels) // COLUMNS)
    pyplot.rcParams.update({"font.size": 7, "axes.titlesize": 8, "axes.titleweight": "bold"})
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(14, 2.1 * lines), constrained_layout=True)
    empty = []
    for place, panel in zip(axes.flat, panels, strict=False):
        defaults, series = panel["fieldConfig"]["defaults"], {}
        for target in panel["targets"]:
            for found in ask(address, target["expr"], start, end):
                name = legend(target["legendFormat"], found["metric"])
                series[name] = {float(at) - start: float(value) for at, value in found["values"] if value != "NaN"}
        moments = sorted({at for values in series.values() for at in values})
        rows = {name: [values.get(at, float("nan")) for at in moments] for name, values in series.items()}
        if "stacking" in defaults["custom"] and rows:
            shown = {
                name: [0.0 if value != value else value for value in row] for name, row in rows.items() if any(row)
            }
            if shown:
                place.stackplot(moments, *shown.values(), labels=list(shown), alpha=0.7)
        else:
            for name, row in rows.items():
                place.plot(moments, row, label=name, linewidth=1)
        if place.get_legend_handles_labels()[1]:
            place.legend(loc="upper left", fontsize=5.5, framealpha=0.6, ncols=2)
        else:
            empty.append(panel["title"])
        place.set(title=panel["title"], xlim=(0, end - start), ylabel=UNITS.get(defaults["unit"], ""))
        place.set_ylim(bottom=0, top=defaults.get("max"))
        place.grid(alpha=0.3)
    for place in list(axes.flat)[len(panels) :]:
        place.set_axis_off()
    figure.savefig(to, dpi=90)
    Image.open(to).convert("P", palette=Image.Palette.ADAPTIVE, colors=48).save(to, optimize=True)
    return empty


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args()
    cluster = Cluster(FLAGS)
    try:
        with tempfile.TemporaryDirectory() as folder, prometheus(cluster.http, Path(folder)) as address:
            time.sleep(10)  # a quiet beginning
            start = time.time() - 5
            asyncio.run(load(cluster.address, options.seconds, cluster.pids["worker-0"]))
            time.sleep(5)
            empty = draw(address, start, time.time(), options.output)
    finally:
        cluster.close()
    print(f"{options.output}; nothing to show in: {', '.join(empty) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
