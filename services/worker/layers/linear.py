"""Linear layers over packed weights."""

from torch import Tensor

from kernels.ops.linear import PackedLinear, linear, linear_add, pack_linear


class Linear:
    """y = x · Wᵀ + b, alone or added to a residual."""

    __slots__ = ("packed",)

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed: PackedLinear = pack_linear(weight, bias)

    def __call__(self, x: Tensor, *, exact: bool) -> Tensor:
        return linear(x, self.packed, exact=exact)

    def add(self, x: Tensor, residual: Tensor, *, exact: bool) -> Tensor:
        return linear_add(x, self.packed, residual, exact=exact)
