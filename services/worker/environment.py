"""What a worker's process must be started with: the C library reads it before Python runs, OpenMP before torch does.

Measured on two Zen 4 cores (bfloat16, 213 M parameters, median ms of a forward; both settings against none, medians of
interleaved runs beside others): one row 22 against 39, sixteen rows 51 against 98, a prompt of 512 560 against 640.
"""

import sys
from collections.abc import Mapping

SPIN_COUNT = "5000"
"""How often an idle OpenMP thread of torch looks for work before it sleeps; libgomp's own default is 300,000.

Decoding with two threads beside three busy processes took 19 ms a step at 1,000 and 241 ms by default, for a thread
that spins keeps the one that computes from its core. Some spinning spares a wake-up between operations that follow
each other closely.
"""

MALLOC = {
    "glibc.malloc.hugetlb": 1,  # weights and pages on huge pages: fewer TLB misses
    "glibc.malloc.mmap_threshold": 32 * 2**20,  # activations come from memory that is kept,
    "glibc.malloc.trim_threshold": 4 * 2**30,  # not from the system anew with a fault per 4 KiB
    "glibc.malloc.arena_max": 1,  # an arena of a thread's own could not hold them
}


CACHED_PRIMITIVES = "256"
"""How many prepared products oneDNN and its wrapper in torch each keep; their own default is 1,024.

They are kept by shape, so mixed traffic fills the caches: a worker grew from 362 to over 900 MiB within 1,350
requests. With 256 it stays at 515. A missing one costs 0.2 to 0.5 ms, and a step uses about ten.
"""


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to `environ` for a worker. What the user has set stays."""
    added = {}
    if not environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        added["GOMP_SPINCOUNT"] = SPIN_COUNT
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in environ:
        added["GLIBC_TUNABLES"] = ":".join(f"{name}={value}" for name, value in MALLOC.items())
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        if name not in environ:
            added[name] = CACHED_PRIMITIVES
    return added
