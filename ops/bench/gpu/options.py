"""What the sections engine and peers can be told. Imports nothing heavy: a dry run sets its environment first."""

import argparse

from ops.bench.gpu.shapes import CASES_OF, SHAPES

PEER_CASES = ("eager", "compiled", "continuous")


def add_options(parser: argparse.ArgumentParser) -> None:
    cases = list(dict.fromkeys(case for names in CASES_OF.values() for case in names))
    engine = parser.add_argument_group("section engine")
    engine.add_argument("--engine-shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    engine.add_argument("--engine-cases", nargs="+", choices=cases, help="at every shape; default: each its own")
    engine.add_argument("--engine-start-s", type=float, default=150.0, help="until the cluster is ready")
    engine.add_argument(
        "--engine-case-s", type=float, default=60.0, help="the limit of a case; bulk, full, exactness: twice"
    )
    engine.add_argument("--engine-shape-s", type=float, default=200.0, help="no case of a shape begins later")
    engine.add_argument("--engine-flags", nargs="+", default=[], help="more flags of `sluice up`, without their --")
    peers = parser.add_argument_group("section peers")
    peers.add_argument("--peer-cases", nargs="+", choices=PEER_CASES, default=list(PEER_CASES))
    peers.add_argument("--peer-s", type=float, default=150.0, help="the limit of one case, its model's start included")
