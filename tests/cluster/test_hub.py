"""A model by its hub id, through the router and the worker, from a hub on a loopback port."""

from pathlib import Path

import pytest

from services.cli.client import Request
from tests.builders.answers import ask_one
from tests.checkpoint.hub import Hub, serve_hub
from tests.models.twins import make_twin

pytestmark = pytest.mark.cluster

GREEDY = Request(prompt="def add(a, b):", temperature=0.0, max_tokens=12, ignore_eos=True)
FLAGS = {"dtype": "float32", "max_num_seqs": 4}


def fetched(hub: Hub, repository: str) -> set[str]:
    """The files of a repository that somebody downloaded."""
    begin = f"GET /{repository}/resolve/"
    return {request.rpartition("/")[2] for request in hub.requests if request.startswith(begin)}


def test_a_hub_id_is_served_and_a_tokenizer_s_comes_without_weights(own_cluster, tmp_path: Path, monkeypatch) -> None:
    folder = make_twin("llama", tmp_path / "origin")
    with serve_hub({"acme/twin": folder, "acme/words": folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with own_cluster(model="acme/twin", tokenizer="acme/words", **FLAGS) as cluster:
            answer = ask_one(cluster.address, GREEDY)
    assert (answer.status, len(answer.only)) == ("OK", 12)
    assert "model.safetensors" in fetched(hub, "acme/twin")
    assert fetched(hub, "acme/words") & {"tokenizer.json", "model.safetensors"} == {"tokenizer.json"}
