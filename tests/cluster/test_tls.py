"""TLS of a real cluster: every process of its router speaks it, and the command line's clients are told how."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from tests.builders.cluster import RunningCluster

pytestmark = pytest.mark.cluster


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The flags of a server, or of a client, for 127.0.0.1."""
    authority, named = trustme.CA(), tmp_path / "tls"
    named.mkdir()
    pair = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(named / "authority.pem"))
    pair.cert_chain_pems[0].write_to_path(str(named / "own.pem"))
    pair.private_key_pem.write_to_path(str(named / "own.key"))
    return {
        "ssl_ca_certs": str(named / "authority.pem"),
        "ssl_certfile": str(named / "own.pem"),
        "ssl_keyfile": str(named / "own.key"),
    }


def sluice(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **variables})


def generate(cluster: RunningCluster, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    asked = ("--max-tokens=4", "--ignore-eos", "--request-id=one", "def add(a, b):")
    return sluice("services.cli.main", "generate", f"--address={cluster.address}", *options, *asked, **variables)


def test_the_command_line_calls_a_cluster_over_tls(own_cluster, files) -> None:
    authority = files.pop("ssl_ca_certs")
    trusting = f"--ssl-ca-certs={authority}"
    with own_cluster(**files, router_processes=2) as running:
        answered = generate(running, trusting)
        assert answered.returncode == 0 and answered.stdout, answered.stderr
        assert generate(running, SLUICE_TLS="1", SSL_CERT_FILE=authority).returncode == 0  # the system's authorities
        traced = sluice("services.cli.main", "trace", f"--address={running.address}", trusting, "one")
        assert traced.returncode == 0 and "decode" in traced.stdout, traced.stderr
        plain = generate(running)
        assert plain.returncode == 1 and "--tls" in plain.stderr
        wrong = generate(running, "--ssl-ca-certs=/nowhere.pem")
        assert wrong.returncode == 2 and "--ssl-ca-certs: cannot use /nowhere.pem" in wrong.stderr
        assert sluice("services.cli.probe", f"https://{running.http('router')}").stdout == "SERVING\n"


def test_a_cluster_that_asks_for_certificates_answers_those_who_have_one(own_cluster, files) -> None:
    variables = {f"SLUICE_{name.upper()}": value for name, value in files.items()}
    with own_cluster(**files) as running:
        answered = generate(running, **variables)
        assert answered.returncode == 0 and answered.stdout, answered.stderr
        nameless = generate(running, f"--ssl-ca-certs={files['ssl_ca_certs']}")
        assert nameless.returncode == 1 and "--ssl-certfile" in nameless.stderr
        address = f"https://{running.http('router')}"
        assert sluice("services.cli.probe", address, **variables).stdout == "SERVING\n"
        assert sluice("services.cli.probe", address).returncode == 1


def test_a_certificate_that_is_missing_stops_the_router_at_once(files) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**files, "ssl_keyfile": "/nowhere.key"}.items()]
    done = sluice("services.cli.main", "router", "--port=0", "--grpc-port=0", *flags)
    assert done.returncode == 2
    assert "--ssl-keyfile: cannot use /nowhere.key: No such file" in done.stderr


def test_the_demo_calls_its_own_router_without_tls_whatever_the_variables_say(files) -> None:
    variables = {f"SLUICE_{name.upper()}": value for name, value in files.items()}
    done = sluice("services.cli.main", "demo", "--threads=1", "--kv-cache-memory-bytes=67108864", **variables)
    assert done.returncode == 0, done.stderr
