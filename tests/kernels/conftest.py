"""One thread where values are compared; test_exactness.py takes the two of a worker, for bits may depend on them."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request.module, "NUM_THREADS", 1))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
