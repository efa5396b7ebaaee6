"""How often the heavy tests repeat: one table, (quick, full). A count is a parameter, never a second test."""

import os

COUNTS: dict[str, tuple[int, int]] = {
    "fuzz_messages": (2_000, 100_000),
    "fuzz_parameters": (1_000, 20_000),
    "fuzz_bodies": (800, 20_000),
    "router_cancels": (50, 1_000),
    "detokenizer_streams": (300, 20_000),
    "cut_answers": (50, 500),
    "cluster_twins": (4, 100),
    "cluster_cancels": (50, 1_000),
    "worker_kills": (10, 100),
    "core_steps": (50_000, 1_000_000),
    "compile_targets": (1, 5),
    "compile_models": (3, 100),
    "candidate_forms": (12, 10_000),
    "fused_twins": (3, 100),
    "soaked_twins": (3, 100),
    "attention_cuts": (10, 200),
    "attention_schedules": (25, 400),
    "decoder_schedules": (15, 300),
    "traced_requests": (120, 1_000),
    "structured_schemas": (40, 500),
}


ASKED: set[str] = set()
"""The rows that tests of this process have asked for; the full tier records them with its results."""


def count(name: str) -> int:
    """The count of the tier that runs: quick, or full with SLUICE_TEST_TIER=full."""
    quick, full = COUNTS[name]
    ASKED.add(name)
    return full if os.environ.get("SLUICE_TEST_TIER") == "full" else quick
