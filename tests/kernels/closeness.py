"""Comparing a fast body with its specification: element by element, and as a whole.

torch's default tolerance for bfloat16 accepts a uniform error of 1 %, so the relative norm of the difference is held
to less (single elements of attention stray further, for its scores are rounded too). test_closeness.py shows that
zeros, a permuted result and a 1 % error are all rejected.
"""

import torch
from torch import Tensor

NORM_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
ELEMENT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.12, torch.float16: 0.015}


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """`expected` is the specification's result for the same inputs."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    dtype, actual, expected = expected.dtype, actual.double(), expected.double()
    size = expected.norm()
    assert size > 0, "nothing to compare"
    error = float((actual - expected).norm() / size)
    assert error <= NORM_TOLERANCE[dtype], f"relative norm of the difference is {error:.2e}"
    scale = expected.abs().mean()
    worst = float(((actual - expected).abs() / (expected.abs() + scale)).max())
    assert worst <= ELEMENT_TOLERANCE[dtype], f"worst element is off by {worst:.2e}"
