"""From the files of a checkpoint to merged and packed parameters, one tensor in memory at a time.

What a checkpoint must hold follows from the spec; headers are compared with it before anything is read, so leftover,
missing or misshapen tensors are refused at once, and NaNs or infinities as they come by.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from services.worker.models.spec import Family, ModelSpec, WeightNames
from shared.checkpoint import Checkpoint, CheckpointError, TensorHeader

FLOATING = ("F32", "F16", "BF16", "F64")
MAX_NAMED = 4
"""Tensors named in one refusal; the rest are counted."""

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor."""


class WeightSource(Protocol):
    """Gives a decoder its tensors by the names of the checkpoint, in the dtype it computes in."""

    def take(self, *names: str) -> Tensor:
        """The named tensors, joined along their first dimension."""

    def has(self, name: str) -> bool: ...


class CheckpointWeights:
    """Reads tensors from memory-mapped safetensors files. A context manager: the files stay open within."""

    def __init__(
        self, checkpoint: Checkpoint, family: Family, dtype: torch.dtype, progress: Progress | None = None
    ) -> None:
        check_tensors(checkpoint, family)
        self._tensors, self._dtype, self._progress = checkpoint.tensors, dtype, progress
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()
        self._bytes_read = 0
        self._bytes_total = sum(file.stat().st_size for file in {tensor.file for tensor in self._tensors.values()})

    def __enter__(self) -> "CheckpointWeights":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._files.clear()
        self._stack.close()

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, *names: str) -> Tensor:
        if len(names) == 1:
            return self._read(names[0])
        shapes = [self._tensors[name].shape for name in names]
        merged = torch.empty(sum(shape[0] for shape in shapes), *shapes[0][1:], dtype=self._dtype)
        for name, part in zip(names, merged.split([shape[0] for shape in shapes]), strict=True):
            part.copy_(self._read(name))
        return merged

    def _read(self, name: str) -> Tensor:
        header = self._tensors[name]
        try:
            tensor = self._open(header.file).get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{header.file}: {name} cannot be read ({error}): download it again") from error
        converted = tensor.to(self._dtype, copy=True)  # a copy: the file's pages need not stay in memory
        _check_finite(converted, header)
        self._bytes_read += tensor.nbytes
        if self._progress is not None:
            self._progress(min(self._bytes_read, self._bytes_total), self._bytes_total)
        return converted

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safetensors.safe_open(file, framework="pt"))
        return self._files[file]


class RandomWeights:
    """Normal weights drawn from a seed, on the device that they are for; norms are ones."""

    def __init__(self, family: Family, dtype: torch.dtype, seed: int, scale: float, device: str = "cpu") -> None:
        self._shapes = dict(expected_tensors(family))
        self._dtype, self._scale, self._device = dtype, scale, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def has(self, name: str) -> bool:
        return name in self._shapes

    def take(self, *names: str) -> Tensor:
        return torch.cat([self._draw(name) for name in names])

    def _draw(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        drawn = torch.empty(shape, device=self._device).normal_(std=self._scale, generator=self._generator)
        return drawn.to(self._dtype)


def expected_tensors(family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor a checkpoint of this spec must hold, with its shape."""
    spec, names = family.spec, family.names
    yield names.embedding, (spec.vocab_size, spec.hidden_size)
    yield names.final_norm, (spec.hidden_size,)
    if not spec.tied_embeddings:
        yield names.head, (spec.vocab_size, spec.hidden_size)
    layer = list(_layer_tensors(spec, names))
    for layer_id in range(spec.num_layers):
        prefix = names.layer.format(layer_id)
        for name, shape in layer:
            yield prefix + name, shape


def check_tensors(checkpoint: Checkpoint, family: Family) -> None:
    """Refuse missing, leftover and misshapen tensors by name; raises CheckpointError."""
    expected, found = dict(expected_tensors(family)), checkpoint.tensors
    # of a tied pair either will do, and where both are there and differ, both are used, as in transformers
    tied = {family.names.head, family.names.embedding} if family.spec.tied_embeddings else set()
    spare = tied if tied & found.keys() else set()
    missing = [name for name in expected if name not in found and name not in spare]
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: the weights lack {_listed(missing)}, which config.json asks for")
    expected |= dict.fromkeys(tied, (family.spec.vocab_size, family.spec.hidden_size))
    leftover = [name for name in found if name not in expected and not name.endswith(family.names.ignored)]
    if leftover:
        file = found[leftover[0]].file
        raise CheckpointError(
            f"{file}: {_listed(leftover)} would be left over: config.json does not describe these weights"
        )
    for name, shape in expected.items():
        if name in found:
            _check_header(found[name], shape)


def _check_header(header: TensorHeader, shape: tuple[int, ...]) -> None:
    if header.shape != shape:
        raise CheckpointError(
            f"{header.file}: {header.name} has the shape {list(header.shape)}, config.json asks for {list(shape)}"
        )
    if header.dtype not in FLOATING:
        raise CheckpointError(
            f"{header.file}: {header.name} is {header.dtype}: only {', '.join(FLOATING)} can be loaded"
        )


def _check_finite(tensor: Tensor, header: TensorHeader) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{header.file}: {header.name} holds NaN or infinite values in {tensor.dtype}: the checkpoint is damaged"
        )


def _layer_tensors(spec: ModelSpec, names: WeightNames) -> Iterator[tuple[str, tuple[int, ...]]]:
    layer, hidden = names.layer_names, spec.hidden_size
    query, key_value = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield f"{layer.attention_norm}.weight", (hidden,)
    yield f"{layer.mlp_norm}.weight", (hidden,)
    if spec.qk_norm:
        yield f"{layer.query_norm}.weight", (spec.head_dim,)
        yield f"{layer.key_norm}.weight", (spec.head_dim,)
    matrices = (
        (layer.query, query, hidden, spec.qkv_bias),
        (layer.key, key_value, hidden, spec.qkv_bias),
        (layer.value, key_value, hidden, spec.qkv_bias),
        (layer.out, hidden, query, spec.out_bias),
        (layer.gate, spec.intermediate_size, hidden, spec.mlp_bias),
        (layer.up, spec.intermediate_size, hidden, spec.mlp_bias),
        (layer.down, hidden, spec.intermediate_size, spec.mlp_bias),
    )
    for name, num_out, num_in, biased in matrices:
        yield f"{name}.weight", (num_out, num_in)
        if biased:
            yield f"{name}.bias", (num_out,)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"
