"""README and ARCHITECTURE say nothing that is not so: commands, flags, links, files."""

import re
from pathlib import Path

import pytest

from services.cli.flags import KINDS, fields_of, flag
from services.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
OWN_FLAGS = {"--config", "--help", "--keep", "--full", "--timing", "--tls", "--address"}


def test_the_first_screen_has_the_two_commands_a_picture_and_a_drawing() -> None:
    screen = "\n".join(README.splitlines()[:40])
    assert "sh ops/scripts/demo" in screen
    assert "sh ops/scripts/test" in screen
    assert re.search(r"!\[.+\]\(.+\.(svg|png)\)", screen)
    assert "```mermaid" in screen


def test_every_flag_that_the_readme_names_exists() -> None:
    flags = {flag(name) for kind in KINDS.values() for name in fields_of(kind)}
    named = {word.replace("--no-", "--") for word in re.findall(r"--[a-z][a-z0-9-]+", README)}
    assert named <= flags | OWN_FLAGS


def test_every_command_is_in_the_readme() -> None:
    for command in COMMANDS:
        assert re.search(rf"`(sluice )?{command}`", README), command


@pytest.mark.parametrize("text", [README, ARCHITECTURE], ids=["README", "ARCHITECTURE"])
def test_every_link_leads_somewhere(text: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_python_file_that_the_architecture_names_exists() -> None:
    names = {
        path.relative_to(ROOT).as_posix()
        for top in ("services", "shared", "tests", "kernels")
        for path in (ROOT / top).rglob("*.py")
    }
    for named in re.findall(r"`([\w/]+\.py)`", ARCHITECTURE):
        assert any(name.endswith("/" + named) or name == named for name in names), named


@pytest.mark.parametrize("path", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "ops/scripts/setup", ".ci/run"])
def test_no_machine_path_and_no_registry_is_named(path: str) -> None:
    text = (ROOT / path).read_text()
    assert not re.search(r"/root/|/work/|/opt/|/home/", text)
    assert not re.search(r"pypi\.org|pythonhosted|registry\.npmjs|deb\.debian", text)
