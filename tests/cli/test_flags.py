"""Flags, variables and TOML keys are the configuration's fields, one to one."""

import asyncio
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from services.cli.cluster import PLACED_HERE, plan_cluster, up_flags
from services.cli.flags import HELP, KINDS, build, fields_of, flag, make_flags, to_argv
from shared.config import ConfigError, RouterConfig, SchedulerConfig, WorkerConfig
from shared.net.address import join_address
from shared.net.server import bind, create_server

SERVICES = ("router", "scheduler", "worker")

# fmt: off
SPELLED_IN_NAMES_MD = [
    "host", "grpc_port", "model", "served_model_name", "tokenizer", "dtype", "device", "block_size",
    "max_model_len", "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_num_seqs",
    "max_num_batched_tokens", "long_prefill_token_threshold", "scheduling_policy", "enable_prefix_caching",
    "max_num_queued_reqs", "shutdown_timeout", "deterministic", "revision", "chat_template", "scheduler",
    "advertise", "port", "metrics_port",
]
# fmt: on


def sluice(*arguments: str, timeout: float = 60, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "200", **environ},
    )


def flags_in_help(*command: str) -> set[str]:
    listing = sluice(*command, "--help").stdout
    return {name for name in re.findall(r"(--[a-z][a-z0-9-]*)", listing) if not name.startswith("--no-")}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_one_flag_per_field_and_no_other(service: str) -> None:
    expected = {flag(name) for name in fields_of(KINDS[service])}
    assert flags_in_help(service) - {"--config", "--help"} == expected


def test_up_has_every_flag_of_every_service_but_those_it_fills_in() -> None:
    fields = {name for kind in KINDS.values() for name in fields_of(kind)} - PLACED_HERE
    own = {"--config", "--ready-file", "--log-file", "--help"}
    shown = flags_in_help("up")
    assert {flag(name) for name in fields} <= shown
    assert shown - own - {flag(name) for name in fields} == set()


@pytest.mark.parametrize("command", ["up", "generate", "scheduler"])
def test_help_shows_whole_names_on_a_narrow_terminal(command: str) -> None:
    narrow = sluice(command, "--help", COLUMNS="80").stdout
    assert "…" not in narrow.replace("SLUICE_…", "").replace("ID,…", "")
    assert set(re.findall(r"--[a-z][a-z0-9-]*", narrow)) >= flags_in_help(command)
    assert "--heartbeat-timeout-ms" in narrow or command == "generate"


def test_every_field_has_a_line_of_help_and_no_line_lacks_its_field() -> None:
    assert {name for kind in KINDS.values() for name in fields_of(kind)} == set(HELP)


def test_the_public_spelling_of_flags_is_kept() -> None:
    fields = {name for kind in KINDS.values() for name in fields_of(kind)}
    assert set(SPELLED_IN_NAMES_MD) <= fields


@pytest.mark.parametrize("service", SERVICES)
def test_defaults_build(service: str) -> None:
    assert build(service, file="", flags={}) == KINDS[service]()


def test_flags_survive_the_way_to_a_child() -> None:
    given = {"max_num_seqs": 3, "enable_prefix_caching": False, "served_model_name": ("a", "b c"), "dtype": "auto"}
    assert to_argv(given) == [
        "--max-num-seqs=3",
        "--no-enable-prefix-caching",
        "--served-model-name=a",
        "--served-model-name=b c",
        "--dtype=auto",
    ]


def test_a_secret_never_reaches_a_command_line() -> None:
    cluster = plan_cluster({"grpc_port": 0, "internal_token": "hush"})
    assert not any("hush" in part for spec in cluster.specs for part in spec.argv)
    assert all(spec.environ["SLUICE_INTERNAL_TOKEN"] == "hush" for spec in cluster.specs)


def test_the_last_one_who_speaks_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sluice.toml"
    file.write_text("max_num_seqs = 10\n[scheduler]\nmax_num_seqs = 11\nmax_num_batched_tokens = 100\n")
    read = lambda **flags: build("scheduler", file=str(file), flags=flags)  # noqa: E731
    assert (read().max_num_seqs, build("worker", file=str(file), flags={}).max_num_seqs) == (11, 10)
    monkeypatch.setenv("SLUICE_MAX_NUM_SEQS", "12")
    assert read().max_num_seqs == 12
    assert read(max_num_seqs=13).max_num_seqs == 13
    assert read().max_num_batched_tokens == 100


@pytest.mark.parametrize("service", SERVICES)
def test_every_field_can_be_set_by_its_variable(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, field in fields_of(KINDS[service]).items():
        default = field.default
        text = ",".join(default) if isinstance(default, tuple) else str(default).lower()
        text = str(default) if isinstance(default, str) else text
        monkeypatch.setenv(f"SLUICE_{name.upper()}", text)
    assert build(service, file="", flags={}) == KINDS[service]()


def test_an_unknown_toml_key_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "sluice.toml"
    file.write_text("[scheduler]\nmax_seqs = 3\n")
    done = sluice("up", f"--config={file}")
    assert done.returncode == 2
    assert "unknown key [scheduler] max_seqs" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_flag_is_refused_by_name() -> None:
    done = sluice("up", "--max-seqs", "3")
    assert done.returncode == 2
    assert "--max-seqs" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dtype", "float8"), "'float8' is not one of auto, float32, bfloat16, float16"),
        (("--max-num-seqs", "many"), "Invalid value for '--max-num-seqs'"),
        (("--max-num-seqs", "0"), "--max-num-seqs"),
        (("--gpu-memory-utilization", "2"), "--gpu-memory-utilization"),
        (("--config", "/nowhere.toml"), "cannot read /nowhere.toml"),
        (("--workers", "0"), "--workers"),
        (("--log-file", "/nowhere/log", "--grpc-port", "0"), "cannot write --log-file /nowhere/log"),
    ],
)
def test_a_bad_value_is_one_sentence_that_names_the_flag(arguments: tuple[str, ...], words: str) -> None:
    done = sluice("up", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_variable_is_named() -> None:
    done = sluice("scheduler", SLUICE_MAX_NUM_SEQS="lots")
    assert done.returncode == 2
    assert "SLUICE_MAX_NUM_SEQS='lots'" in done.stderr


@pytest.mark.parametrize("service", [*SERVICES, "up"])
def test_an_unknown_variable_is_refused_with_the_name_that_was_meant(service: str) -> None:
    done = sluice(service, SLUICE_MAX_NUM_SEQZ="3")
    assert done.returncode == 2
    assert "unknown variable SLUICE_MAX_NUM_SEQZ; did you mean SLUICE_MAX_NUM_SEQS?" in done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_variables_of_others_are_known_to_every_service(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLUICE_ADDRESS", "SLUICE_CONFIG", "SLUICE_TEST_TIER", "SLUICE_TORCH_INDEX"):
        monkeypatch.setenv(name, "")
    for name in {name for kind in KINDS.values() for name in fields_of(kind)} - set(fields_of(KINDS[service])):
        monkeypatch.setenv(f"SLUICE_{name.upper()}", "1")
    assert build(service, file="", flags={}) == KINDS[service]()


def test_the_names_of_services_reach_only_those_who_know_them() -> None:
    cluster = plan_cluster({"grpc_port": 0, "max_num_seqs": 5, "scheduling_policy": "priority", "host": "127.0.0.1"})
    argv = {spec.name: spec.argv for spec in cluster.specs}
    assert "--scheduling-policy=priority" in argv["scheduler"]
    assert not any("scheduling-policy" in part for part in (*argv["router"], *argv["worker-0"]))
    assert "--max-num-seqs=5" in argv["scheduler"]
    assert "--max-num-seqs=5" in argv["worker-0"]
    assert not any("max-num-seqs" in part for part in argv["router"])


def test_every_planned_command_line_parses_into_the_configuration_it_means() -> None:
    cluster = plan_cluster({"grpc_port": 0, "workers": 2, "dtype": "float32"})
    for spec in cluster.specs:
        service = spec.name.partition("-")[0]
        known = {flag(name): name for name in fields_of(KINDS[service])}
        words = spec.argv[spec.argv.index(service) + 1 :]
        assert all(word.partition("=")[0] in known for word in words)


def test_two_workers_have_ports_and_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.cluster.psutil.cpu_count", lambda logical: 8)
    cluster = plan_cluster({"grpc_port": 0, "workers": 2})
    assert len(set(cluster.workers)) == 2
    workers = [spec.argv for spec in cluster.specs if spec.name.startswith("worker")]
    assert all("--threads=4" in argv for argv in workers)


def test_ports_are_the_published_ones_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.cluster_ports.require_free", lambda *_, **__: None)
    cluster = plan_cluster({"workers": 2})
    assert cluster.router == "127.0.0.1:50051"
    assert cluster.scheduler == "127.0.0.1:50052"
    assert cluster.workers == ("127.0.0.1:50053", "127.0.0.1:50054")
    moved = plan_cluster({"grpc_port": 7001, "scheduler_port": 7002, "worker_port": 7003})
    assert (moved.router, moved.scheduler, moved.workers) == ("127.0.0.1:7001", "127.0.0.1:7002", ("127.0.0.1:7003",))


def test_http_ports_are_the_published_ones_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.cluster_ports.require_free", lambda *_, **__: None)
    here = lambda **ports: {name.replace("_", "-"): f"127.0.0.1:{port}" for name, port in ports.items()}  # noqa: E731
    published = plan_cluster({"workers": 2}).http
    assert published == here(router=8000, scheduler=9052, worker_0=9053, worker_1=9054)
    told = plan_cluster({"workers": 2, "port": 7000, "metrics_port": 7100}).http
    assert told == here(router=7000, scheduler=7100, worker_0=7101, worker_1=7102)
    free = plan_cluster({"workers": 2, "grpc_port": 0}).http
    assert len(set(free.values())) == 4
    assert not set(free.values()) & set(published.values())
    assert plan_cluster({"grpc_port": 0, "port": 7000}).http["router"] == "127.0.0.1:7000"


def test_a_port_told_to_up_is_the_routers_and_no_other_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.cluster_ports.require_free", lambda *_, **__: None)
    monkeypatch.setenv("SLUICE_PORT", "7000")
    cluster = plan_cluster({})
    assert (cluster.http["router"], cluster.scheduler) == ("127.0.0.1:7000", "127.0.0.1:50052")
    argv = {spec.name: spec.argv for spec in cluster.specs}
    assert "--port=7000" in argv["router"]
    assert {"--port=50052", "--metrics-port=9052"} <= set(argv["scheduler"])
    assert {"--port=50053", "--metrics-port=9053"} <= set(argv["worker-0"])


def test_a_services_own_section_sets_its_metrics_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.cluster_ports.require_free", lambda *_, **__: None)
    file = tmp_path / "sluice.toml"
    file.write_text("[worker]\nmetrics_port = 7200\n")
    cluster = plan_cluster({"workers": 2}, file=str(file))
    assert (cluster.http["worker-1"], cluster.http["scheduler"]) == ("127.0.0.1:7201", "127.0.0.1:9052")


def test_two_services_on_one_port_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.cluster_ports.require_free", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="router and scheduler would share port 50052"):
        plan_cluster({"grpc_port": 50052})
    with pytest.raises(ConfigError, match=r"router and router-http would share port 8000.*--port"):
        plan_cluster({"grpc_port": 8000})


def test_services_inside_stay_on_loopback_when_the_router_is_opened() -> None:
    cluster = plan_cluster({"grpc_port": 0, "host": "0.0.0.0"})
    argv = {spec.name: spec.argv for spec in cluster.specs}
    assert "--host=0.0.0.0" in argv["router"]
    assert "--host=127.0.0.1" in argv["scheduler"]
    assert "--host=127.0.0.1" in argv["worker-0"]
    assert cluster.router.startswith("127.0.0.1:")


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid", "a..b"])
@pytest.mark.parametrize("port", [0, 50051])
def test_a_host_that_is_not_ours_is_a_sentence(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:{port}: .*; see --host and --grpc-port"):
        plan_cluster({"grpc_port": port, "host": host})


@pytest.mark.parametrize(
    ("host", "address"),
    [("::1", "[::1]:1"), ("[::1]", "[::1]:1"), ("localhost", "localhost:1"), ("1.2.3.4", "1.2.3.4:1")],
)
def test_an_ipv6_address_gets_its_brackets(host: str, address: str) -> None:
    assert join_address(host, 1) == address


def has_ipv6_loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6_loopback(), reason="this machine has no IPv6 loopback (::1)")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6_loopback_is_served_with_and_without_brackets(host: str) -> None:
    cluster = plan_cluster({"grpc_port": 0, "host": host})
    assert cluster.router.startswith("[::1]:")

    async def bound() -> int:
        server = create_server(max_receive_bytes=1)
        return bind(server, host, int(cluster.router.rpartition(":")[2]))

    assert asyncio.run(bound()) == int(cluster.router.rpartition(":")[2])


def test_a_taken_port_is_named_with_its_holder_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = sluice("up", f"--grpc-port={port}")
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr
    assert "--grpc-port" in done.stderr
    assert f"pid {os.getpid()}" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_quick_and_imports_neither_grpc_nor_torch() -> None:
    program = (
        "import sys; sys.argv = ['sluice', '--help']\n"
        "from services.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'torch', 'google.protobuf', 'tokenizers', 'uvloop'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("up", "router", "scheduler", "worker", "generate", "chat", "doctor"):
        assert command in done.stdout


def test_flags_can_be_made_of_every_kind_of_field() -> None:
    class Odd(msgspec.Struct):
        things: dict[str, int] = {}

    with pytest.raises(TypeError, match="things"):
        make_flags([Odd])  # type: ignore[list-item]
    assert len(up_flags()) == len({f.name for f in up_flags()})
    assert {f.name for f in make_flags([RouterConfig, SchedulerConfig, WorkerConfig])} == {
        name for kind in (RouterConfig, SchedulerConfig, WorkerConfig) for name in fields_of(kind)
    }
