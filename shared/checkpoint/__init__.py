"""Which files make up a checkpoint, and reading them, without torch."""

from shared.checkpoint.checkpoint import Checkpoint, open_checkpoint, read_config
from shared.checkpoint.errors import CheckpointError
from shared.checkpoint.headers import TensorHeader
from shared.checkpoint.source import BUNDLED_FOLDER, Progress, locate

__all__ = [
    "BUNDLED_FOLDER",
    "Checkpoint",
    "CheckpointError",
    "Progress",
    "TensorHeader",
    "locate",
    "open_checkpoint",
    "read_config",
]
