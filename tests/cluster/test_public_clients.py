"""The public proto generates as it is, in Python and in Node, and the clients get the same answer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.test_up import ask, text_of

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
NODE = Path(__file__).with_name("node")
INSTALLED = ROOT / "build" / "node-client"
PROMPT = "def add(a, b):\n"

PYTHON_CLIENT = """
import json, sys
import grpc
from sluice.v1 import inference_pb2 as pb, inference_pb2_grpc as rpc

with grpc.insecure_channel(sys.argv[1]) as channel:
    request = pb.GenerateRequest(
        prompt=sys.argv[2], sampling=pb.Sampling(temperature=0), stopping=pb.Stopping(max_tokens=16)
    )
    deltas = [response.delta for response in rpc.InferenceStub(channel).Generate(request)]
print(json.dumps({"text": "".join(d.text for d in deltas), "tokens": [i for d in deltas for i in d.token_ids]}))
"""


def test_a_python_client_made_from_the_public_proto_is_served(cluster, tmp_path: Path) -> None:
    # fmt: off
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", f"--python_out={tmp_path}",
         f"--grpc_python_out={tmp_path}", "sluice/v1/inference.proto"],
        cwd=ROOT, check=True,
    )
    # fmt: on
    address = cluster().address
    done = subprocess.run(
        [sys.executable, "-c", PYTHON_CLIENT, address, PROMPT],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == text_of(ask(address))


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """grpc-js and its proto loader, installed once under build/."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed: the Node client is not tried")
    if not (INSTALLED / "node_modules" / "@grpc" / "proto-loader").is_dir():
        INSTALLED.mkdir(parents=True, exist_ok=True)
        shutil.copy(NODE / "package.json", INSTALLED)
        command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
        done = subprocess.run(command, cwd=INSTALLED, capture_output=True, text=True, timeout=240)
        if done.returncode != 0:
            pytest.skip(f"npm could not install @grpc/grpc-js: {done.stderr.strip()[-200:]}")
    return INSTALLED / "node_modules"


def test_a_node_client_made_from_the_public_proto_is_served(cluster, node_modules: Path) -> None:
    address = cluster().address
    done = subprocess.run(
        ["node", str(NODE / "client.js"), address, str(ROOT / "proto" / "sluice" / "v1" / "inference.proto"), PROMPT],
        capture_output=True,
        text=True,
        env={**os.environ, "NODE_PATH": str(node_modules)},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["text"] == text_of(ask(address))
    assert answer["reason"] in ("FINISH_REASON_LENGTH", "FINISH_REASON_STOP")
    assert answer["seed"] is not None
