"""Linear layers over packed weights."""

from torch import Tensor

from kernels.ops.activation import Activation, activate, activate_and_mul
from kernels.ops.forms import Products
from kernels.ops.linear import PackedGate, PackedLinear, gated_linear, linear, linear_add, pack_gated, pack_linear


class Linear:
    """y = x · Wᵀ + b, alone or added to a residual."""

    __slots__ = ("packed",)

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, by_rows: bool = False) -> None:
        self.packed: PackedLinear = pack_linear(weight, bias, by_rows=by_rows)

    def __call__(self, x: Tensor, *, exact: bool) -> Tensor:
        return linear(x, self.packed, exact=exact)

    def add(self, x: Tensor, residual: Tensor, *, exact: bool) -> Tensor:
        return linear_add(x, self.packed, residual, exact=exact)


class GatedLinear:
    """y = silu(g) * u with [g, u] = x · Wᵀ + b, from the merged gate and up projections."""

    __slots__ = ("packed",)

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, by_rows: bool = False) -> None:
        self.packed: PackedGate = pack_gated(weight, bias, by_rows=by_rows)

    def __call__(self, x: Tensor, *, exact: bool) -> Tensor:
        return gated_linear(x, self.packed, exact=exact)

    def products(self) -> Products:
        return [("gated_linear", self.packed)]


class ActivatedLinear:
    """y = act(x · Wᵀ + b) or, `gated`, act(g) * u with [g, u] = x · Wᵀ + b."""

    __slots__ = ("activation", "gated", "linear")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activation: Activation,
        gated: bool,
        by_rows: bool = False,
    ) -> None:
        self.linear = Linear(weight, bias, by_rows=by_rows)
        self.activation, self.gated = activation, gated

    def __call__(self, x: Tensor, *, exact: bool) -> Tensor:
        function = activate_and_mul if self.gated else activate
        return function(self.linear(x, exact=exact), self.activation, exact=exact)

    def products(self) -> Products:
        return [("linear", self.linear.packed)]
