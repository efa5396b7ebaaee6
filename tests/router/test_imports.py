"""The router starts fast and knows no torch."""

import subprocess
import sys

PROGRAM = """
import sys, time
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "triton", "transformers"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
begin = time.process_time()
import services.router.app
print(time.process_time() - begin)
"""


def test_the_router_imports_in_under_a_second_without_torch():
    seconds = min(
        float(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    )
    assert seconds < 1
