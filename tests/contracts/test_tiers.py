"""The two tiers are one set of tests with one table of counts."""

import ast
import os
import stat
from pathlib import Path

import pytest

from tests import counts
from tests.full import SECTIONS

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def test_a_count_is_small_unless_the_full_tier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    name, (quick, full) = next(iter(counts.COUNTS.items()))
    monkeypatch.setattr(counts, "ASKED", set())
    monkeypatch.delenv("SLUICE_TEST_TIER", raising=False)
    assert counts.count(name) == quick
    monkeypatch.setenv("SLUICE_TEST_TIER", "full")
    assert counts.count(name) == full
    assert name in counts.ASKED


def test_every_count_is_used_by_a_test_and_grows() -> None:
    asked = {
        node.args[0].value
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "count"
        and isinstance(node.args[0], ast.Constant)
    }
    assert asked == set(counts.COUNTS)
    assert all(0 < quick <= full for quick, full in counts.COUNTS.values())


def test_every_folder_of_tests_belongs_to_one_section() -> None:
    folders = {path.name for path in TESTS.iterdir() if any(path.rglob("test_*.py"))}
    sections = [folder for names in SECTIONS.values() for folder in names]
    assert folders <= set(sections)
    assert len(sections) == len(set(sections))


@pytest.mark.parametrize("name", ["setup", "demo", "test", "check", "bench", "protos"])
def test_the_scripts_are_executable_and_posix(name: str) -> None:
    script = ROOT / "ops" / "scripts" / name
    assert script.read_text().startswith("#!/bin/sh\n")
    assert os.stat(script).st_mode & stat.S_IXUSR


def test_ci_runs_what_a_person_runs() -> None:
    assert "sh ops/scripts/test" in (ROOT / ".ci" / "run").read_text()
