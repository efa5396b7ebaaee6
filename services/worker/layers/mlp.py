"""Feed-forward layers."""

from torch import Tensor

from services.worker.layers.linear import GatedLinear, Linear


class GatedMlp:
    """SwiGLU: down(silu(gate(x)) * up(x)), added to the residual."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: GatedLinear, down: Linear) -> None:
        self.gate_up, self.down = gate_up, down

    def add(self, x: Tensor, residual: Tensor, *, exact: bool) -> Tensor:
        return self.down.add(self.gate_up(x, exact=exact), residual, exact=exact)
