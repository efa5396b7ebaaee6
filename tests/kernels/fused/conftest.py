"""These run under Triton's interpreter (tests/conftest.py asks for it), or on a GPU where there is one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is published for Linux only")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter cuts float32 off to make bfloat16; a GPU rounds to the nearest, ties to even."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source != triton.language.float32 or target != triton.language.bfloat16:
            return convert(data, source, target, mode)
        bits = np.frombuffer(data.tobytes(), dtype=np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        kept_nan = ((bits >> 16) | 0x40).astype(np.uint16)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(is_nan, kept_nan, nearest).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    yield
