"""These run under Triton's interpreter (tests/conftest.py asks for it), or on a GPU where there is one."""

from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is published for Linux only")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two things that the interpreter of Triton 3.7 does to bfloat16 and a GPU does not.

    It cuts float32 off to make bfloat16 (a GPU rounds to the nearest, ties to even), and multiplies in `tl.dot` the
    integers that it keeps bfloat16 in. Other arithmetic on bfloat16 is as wrong: widen to float32 first.
    """
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter, "_convert_float", _rounding(interpreter._convert_float))
    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_dot", _widening(builder.create_dot, interpreter.TensorHandle))


def _rounding(convert: Any) -> Any:
    def rounded(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source != triton.language.float32 or target != triton.language.bfloat16:
            return convert(data, source, target, mode)
        bits = np.frombuffer(data.tobytes(), dtype=np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        kept_nan = ((bits >> 16) | 0x40).astype(np.uint16)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return np.where(is_nan, kept_nan, nearest).reshape(data.shape)

    return rounded


def _widening(dot: Any, handle: Any) -> Any:
    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != triton.language.bfloat16:
            return operand
        return handle((operand.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    def wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    return wide_dot
