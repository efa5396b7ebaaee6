"""Feed-forward layers."""

from torch import Tensor

from kernels.ops.linear import gated_linear
from services.worker.layers.linear import Linear


class GatedMlp:
    """SwiGLU: down(silu(gate(x)) * up(x)), added to the residual."""

    __slots__ = ("down", "gate", "up")

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        self.gate, self.up, self.down = gate, up, down

    def add(self, x: Tensor, residual: Tensor, *, exact: bool) -> Tensor:
        return self.down.add(gated_linear(x, self.gate.packed, self.up.packed, exact=exact), residual, exact=exact)
