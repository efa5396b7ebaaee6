"""Every number that shapes the bundled model, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"  # checkpoints of a run in progress; ignored by git


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions. The embedding is tied, the head dimension is 64."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Settings:
    """One training run: the model, its draft, their data and their optimiser."""

    seed: int = 20261120
    vocabulary: int = 4096
    positions: int = 2048
    model: Shape = field(default_factory=lambda: Shape(384, 1024, 4, 6, 2))
    draft: Shape = field(default_factory=lambda: Shape(128, 256, 2, 2, 1))

    held_out: float = 0.04  # share of the files that training never sees
    test_share: float = 0.5  # share of the library's own tests that is used
    library_passes: int = 2  # how often one epoch holds each library file; a test file comes once
    chat_passes: int = 3  # how often one epoch holds each documented function, each time asked differently
    document_tokens: int = 1900  # a longer file is cut at its top-level definitions
    chat_tokens: int = 480  # a longer question and answer is left out

    batch_tokens: int = 4096
    draft_batch_tokens: int = 2048
    short: int = 512  # sequence length for most of the time
    long: int = 2048  # sequence length at the end, so that every position is trained
    long_from: float = 0.82  # share of the time after which sequences are long
    warmup: float = 0.02  # share of the time
    matrix_rate: float = 0.02  # Muon, for the matrices inside the layers
    vector_rate: float = 0.004  # AdamW, for the embedding and the norms
    weight_decay: float = 0.02
    clip: float = 1.0  # gradient norm
    evaluation_tokens: int = 16_384  # per kind of held-out text, while training
    checkpoint_seconds: int = 600
    evaluation_seconds: int = 900
    compile: bool = True  # torch.compile: a fifth faster, after a minute; needs a C++ compiler
    threads: int = 2
