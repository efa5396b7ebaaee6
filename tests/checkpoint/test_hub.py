"""Hub ids, against a hub on a loopback port; in processes of their own: HF_* are read at the import of the library."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.builders import write_checkpoint
from tests.checkpoint.hub import serve_hub

REPOSITORY = "acme/tiny"
CODE = """
import json, sys
from shared.checkpoint import CheckpointError, open_checkpoint, read_config
seen = []
try:
    if len(sys.argv) > 3:
        read_config(sys.argv[1])
        print(json.dumps({}))
        sys.exit()
    checkpoint = open_checkpoint(
        sys.argv[1], revision=sys.argv[2] or None, progress=lambda done, total: seen.append((done, total))
    )
    print(json.dumps({"folder": str(checkpoint.folder), "tensors": len(checkpoint.tensors), "progress": seen}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def hub(tmp_path):
    folder = write_checkpoint(tmp_path / "origin", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "tokenizer.json").write_text("{}")
    with serve_hub({REPOSITORY: folder}, revisions=("main", "v2")) as hub:
        yield hub


def fetch(
    model: str, endpoint: str, home: Path, *, revision: str = "", config_alone: bool = False, **environment: str
) -> dict:
    names = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", CODE, model, revision, *(["config"] if config_alone else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=inherited | names, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hub_id_is_downloaded_once_with_progress_and_then_served_offline(hub, tmp_path):
    home = tmp_path / "home"
    first = fetch(REPOSITORY, hub.endpoint, home)
    assert first["tensors"] == 4
    assert first["progress"], "no progress was reported"
    assert not any("pytorch_model.bin" in request for request in hub.requests)
    assert (Path(first["folder"]) / "tokenizer.json").exists()
    asked = len(hub.requests)
    offline = fetch(REPOSITORY, hub.endpoint, home, HF_HUB_OFFLINE="1")
    assert offline["folder"] == first["folder"]
    assert len(hub.requests) == asked


def test_what_needs_no_weights_fetches_none_and_what_does_fetches_the_rest(hub, tmp_path):
    fetch(REPOSITORY, hub.endpoint, tmp_path / "home", config_alone=True)
    got = {
        request.rpartition("/")[2] for request in hub.requests if request.startswith("GET") and "/resolve/" in request
    }
    assert got == {"config.json", "tokenizer.json"}
    assert fetch(REPOSITORY, hub.endpoint, tmp_path / "home")["tensors"] == 4


def test_a_cached_model_outlives_its_hub(hub, tmp_path):
    home = tmp_path / "home"
    first = fetch(REPOSITORY, hub.endpoint, home)
    assert fetch(REPOSITORY, "http://127.0.0.1:9", home)["folder"] == first["folder"]


def test_a_revision_is_asked_for(hub, tmp_path):
    assert fetch(REPOSITORY, hub.endpoint, tmp_path / "home", revision="v2")["tensors"] == 4
    assert any("/revision/v2" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("model", "revision", "part"),
    [
        ("acme/nothing", "", "there is no acme/nothing on the hub"),
        (REPOSITORY, "v9", "no revision 'v9'"),
        ("not a name", "", "neither a folder nor a hub id"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(hub, tmp_path, model, revision, part):
    assert part in fetch(model, hub.endpoint, tmp_path / "home", revision=revision)["error"]


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "unreachable"])
def test_a_model_that_is_neither_cached_nor_within_reach_is_refused(tmp_path, environment):
    error = fetch(REPOSITORY, "http://127.0.0.1:9", tmp_path / "home", **environment)["error"]
    assert "not in the local cache" in error
