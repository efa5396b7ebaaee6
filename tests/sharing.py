"""How two processes share the quick tier (pytest-xdist): file by file, in the order of their names.

The tests that start clusters are one piece of work. Their clusters are then shared by configuration as in a single
process, and what is measured against the clock there never runs beside another cluster; only beside tests that compute
on one thread.
"""

from xdist.scheduler import LoadFileScheduling

TOGETHER = ("tests/bench/test_host.py", "tests/cluster/", "tests/faults/", "tests/fuzz/")
"""What is one piece of work: all that starts processes and looks at the clock."""


class BySharing(LoadFileScheduling):
    """`--dist loadfile`, but for what goes together."""

    def schedule(self) -> None:
        # Files with many tests are not the long ones; by name, the clusters begin early and small files end it.
        self.config.option.loadscopereorder = False
        super().schedule()

    def _split_scope(self, nodeid: str) -> str:
        return "clusters" if nodeid.startswith(TOGETHER) else super()._split_scope(nodeid)
