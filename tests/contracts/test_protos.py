"""proto/ is the contract: the committed stubs say the same, and every RPC has somebody who serves it and tests it."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))
PUBLIC = ("inference", "control")


def protoc(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    """The files of proto/, compiled now, by stem."""
    out = tmp_path_factory.mktemp("protos") / "set.pb"
    protoc("-Ishared/rpc=proto", f"--descriptor_set_out={out}", *(str(p.relative_to(ROOT)) for p in PROTOS))
    compiled = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    return {Path(file.name).stem: file for file in compiled.file}


def committed(stem: str) -> descriptor_pb2.FileDescriptorProto:
    module = importlib.import_module(f"shared.rpc.sluice.v1.{stem}_pb2")
    return descriptor_pb2.FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)


def strip_json_names(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """protoc writes json_name into descriptor sets and not into generated code."""

    def strip(message: descriptor_pb2.DescriptorProto) -> None:
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            strip(nested)

    for message in file.message_type:
        strip(message)
    return file


@pytest.mark.parametrize("stem", [path.stem for path in PROTOS])
def test_stubs_say_what_proto_says(stem: str, fresh: dict[str, descriptor_pb2.FileDescriptorProto]) -> None:
    assert committed(stem) == strip_json_names(fresh[stem]), "run ops/scripts/protos"


@pytest.mark.parametrize("stem", [path.stem for path in PROTOS])
def test_stubs_have_a_method_for_every_rpc(stem: str, fresh: dict[str, descriptor_pb2.FileDescriptorProto]) -> None:
    services = {service.name: {m.name for m in service.method} for service in fresh[stem].service}
    module = importlib.import_module(f"shared.rpc.sluice.v1.{stem}_pb2_grpc") if services else None
    for service, methods in services.items():
        servicer = getattr(module, f"{service}Servicer")
        assert {name for name in vars(servicer) if not name.startswith("_")} == methods


def test_every_enum_has_an_unspecified_zero(fresh: dict[str, descriptor_pb2.FileDescriptorProto]) -> None:
    for file in fresh.values():
        for enum in (*file.enum_type, *(e for message in file.message_type for e in message.enum_type)):
            assert enum.value[0].number == 0
            assert enum.value[0].name.endswith("_UNSPECIFIED")


def rpcs() -> list[tuple[str, str]]:
    return [
        (service.name, method.name)
        for path in PROTOS
        for service in committed(path.stem).service
        for method in service.method
    ]


def handlers() -> set[str]:
    """The names of all functions that classes under services/ define, by AST: importing would need torch."""
    names: set[str] = set()
    for path in (ROOT / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any("Servicer" in ast.unparse(base) for base in node.bases):
                served = next(re.sub("Servicer$", "", ast.unparse(base).split(".")[-1]) for base in node.bases)
                names |= {
                    f"{served}.{item.name}"
                    for item in node.body
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
                }
    return names


@pytest.mark.parametrize(("service", "method"), rpcs())
def test_every_rpc_has_a_servicer(service: str, method: str) -> None:
    assert f"{service}.{method}" in handlers()


CLIENT_SPELLING = {
    "Generate": "client.generate",
    "ListModels": "client.list_models",
    "Abort": "client.abort",
    "GetServerInfo": "client.server_info",
    "GetLoad": "client.load",
    "Drain": "client.drain",
    "CountRequests": "peers.requests_in_flight",
    "ReadMetrics": "peers.snapshots",
}
"""How tests that go through services.cli.client or services.router.peers spell an RPC."""


@pytest.mark.parametrize(("service", "method"), rpcs())
def test_every_rpc_has_a_test_that_names_it(service: str, method: str) -> None:
    texts = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    called = re.compile(rf"\.{method}\(|{re.escape(CLIENT_SPELLING.get(method, f'.{method}('))}\b")
    assert any(called.search(text) for text in texts)


@pytest.mark.parametrize("stem", PUBLIC)
def test_a_public_proto_generates_as_it_is(stem: str, tmp_path: Path) -> None:
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python")]
    protoc("-Iproto", *out, f"sluice/v1/{stem}.proto")
    program = f"from sluice.v1 import {stem}_pb2, {stem}_pb2_grpc; print({stem}_pb2.DESCRIPTOR.package)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.stdout.strip() == "sluice.v1", done.stderr


@pytest.mark.parametrize("stem", PUBLIC)
def test_a_public_proto_imports_nothing_of_ours(stem: str) -> None:
    assert list(committed(stem).dependency) == []
