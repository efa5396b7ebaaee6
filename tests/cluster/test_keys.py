"""API keys in a real cluster: what a tenant has computed is for its own requests alone."""

import subprocess
import sys
from pathlib import Path

import openai
import pytest

from services.cli.client import BlockingClient, CallError, Request
from tests.router.test_gate import write_keys

pytestmark = pytest.mark.cluster

PROMPT = "def read_lines(path):\n    # " + "one line after the other, " * 20
KEYS = {"ann": 'tenant = "a"', "abe": 'tenant = "a"', "bob": "", "root": "admin = true"}


def test_cached_blocks_are_a_tenants_own_by_either_door(own_cluster, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.toml", **KEYS)
    with own_cluster(api_key_file=str(keys)) as running:
        ask = Request(prompt=PROMPT, max_tokens=4, temperature=0)

        def cached(key: str) -> int:
            with BlockingClient(running.address, api_key=key) as client:
                usage = client.complete(ask, timeout_s=60).usage
            assert usage is not None
            return usage.cached_tokens

        def cached_by_http(key: str) -> int:
            with openai.OpenAI(base_url=f"http://{running.http('router')}/v1", api_key=key) as client:
                told = client.completions.create(model="bundled", prompt=PROMPT, max_tokens=4, temperature=0)
            return told.usage.prompt_tokens_details.cached_tokens

        assert cached("ann") == 0
        hit = cached("ann")
        assert hit > 0
        assert cached_by_http("abe") == hit  # of the same tenant
        assert cached_by_http("bob") == 0  # of another
        assert cached("bob") == hit
        with BlockingClient(running.address) as client, pytest.raises(CallError) as caught:
            client.complete(ask, timeout_s=60)
        assert caught.value.status == "UNAUTHENTICATED"
        stranger = openai.OpenAI(base_url=f"http://{running.http('router')}/v1", api_key="none")
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert not any(key in running.log() for key in ("Bearer", '"ann ', "sha256"))


def test_the_command_line_sends_the_key_of_its_environment(own_cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_API_KEY", "hush")
    with own_cluster() as running:
        generate = [sys.executable, "-m", "services.cli.main", "generate", f"--address={running.address}"]

        def ask() -> subprocess.CompletedProcess[str]:
            return subprocess.run([*generate, "--max-tokens=4", PROMPT], capture_output=True, text=True, timeout=60)

        assert ask().returncode == 0
        monkeypatch.delenv("SLUICE_API_KEY")
        without = ask()
        assert without.returncode == 1 and "UNAUTHENTICATED" in without.stderr
        assert "hush" not in running.log()
