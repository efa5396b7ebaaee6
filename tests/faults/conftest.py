"""The model that clusters in fault tests serve: tiny, float32, so that every answer can be compared to the bit."""

import pytest

from tests.models.twins import make_twin

FLAGS = {"dtype": "float32", "max_num_seqs": 32, "max_num_batched_tokens": 512}


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Flags for a cluster on the twin."""
    return {"model": str(make_twin("llama", tmp_path_factory.mktemp("twin"))), **FLAGS}
