"""Gates of feed-forward layers."""

from torch import Tensor

from kernels.cpu import activation as cpu
from kernels.reference import activation as reference


def silu_and_mul(gate_up: Tensor, *, exact: bool = False) -> Tensor:
    """y = silu(g) * u for gate_up = [g, u], [rows, 2 * width] → [rows, width] (Shazeer, 2020).

    With `exact`, an element's bits do not depend on where in the tensor it stands.
    """
    return (cpu if gate_up.device.type == "cpu" else reference).silu_and_mul(gate_up, exact=exact)
