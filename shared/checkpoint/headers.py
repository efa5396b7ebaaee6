"""Safetensors headers, read without touching a tensor; and a glance at the tensors' ends.

A file begins with the header's length (8 bytes, little endian), then the header (JSON: name → dtype, shape, byte
range, and `__metadata__`), then the tensors' bytes, which must fill the file to its last byte.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from shared.checkpoint.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

SAMPLE_BYTES = 64
"""Read at each end of a tensor to tell one training from another."""


class TensorHeader(msgspec.Struct, frozen=True):
    """A tensor in a checkpoint: `file` from byte `start` to `end`; `dtype` as safetensors spells it (F32, BF16, …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def read_headers(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one file by name; raises CheckpointError where it is truncated or no safetensors at all."""
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if file_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(f"{file} is not a complete safetensors file: download it again")
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        headers = {name: _tensor_header(file, name, entry, 8 + header_bytes) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} has a damaged safetensors header: download it again") from error
    missing_bytes = max((tensor.end for tensor in headers.values()), default=8 + header_bytes) - file_bytes
    if missing_bytes > 0:
        raise CheckpointError(f"{file} is truncated ({missing_bytes:,} bytes are missing): download it again")
    if missing_bytes < 0:
        raise CheckpointError(f"{file} has {-missing_bytes:,} bytes after its last tensor: download it again")
    return headers


def _tensor_header(file: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorHeader:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= begin <= end:
        raise ValueError(f"{name} lies at {begin} to {end}")
    shape = tuple(int(size) for size in entry["shape"])
    return TensorHeader(name, str(entry["dtype"]), shape, file, data_start + begin, data_start + end)


def read_samples(file: Path, tensors: Iterable[TensorHeader]) -> Iterator[tuple[str, bytes]]:
    """The first and the last bytes of each of these tensors of one file, by name."""
    with file.open("rb", buffering=0) as stream:
        for tensor in tensors:
            count = min(SAMPLE_BYTES, tensor.end - tensor.start)
            stream.seek(tensor.start)
            first = stream.read(count)
            stream.seek(tensor.end - count)
            yield tensor.name, first + stream.read(count)
