"""From the files of a checkpoint to merged and packed parameters, one tensor in memory at a time.

What a checkpoint must hold follows from the spec; headers are compared with it before anything is read, so leftover,
missing or misshapen tensors are refused at once, and NaNs or infinities as they come by.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import safetensors
import torch
from torch import Tensor

from services.worker.layers.positions import Learned
from services.worker.models.spec import (
    Experts,
    Family,
    LayerNames,
    LayerNormSpec,
    ModelSpec,
    Plain,
    Stored,
    WeightNames,
)
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
    """Reads tensors from memory-mapped safetensors files to a device. A context manager: the files stay open within."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        dtype: torch.dtype,
        progress: Progress | None = None,
        device: str = "cpu",
    ) -> None:
        check_tensors(checkpoint, Family(family.spec, names_in(family, lambda name: name in checkpoint.tensors)))
        self._tensors, self._dtype, self._progress, self._device = checkpoint.tensors, dtype, progress, device
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
        rows = sum(shape[0] for shape in shapes)
        merged = torch.empty(rows, *shapes[0][1:], dtype=self._dtype, device=self._device)
        for name, part in zip(names, merged.split([shape[0] for shape in shapes]), strict=True):
            part.copy_(self._read(name))
        return merged

    def _read(self, name: str) -> Tensor:
        header = self._tensors[name]
        try:
            tensor = self._open(header.file).get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{header.file}: {name} cannot be read ({error}): download it again") from error
        converted = tensor.to(self._device, self._dtype, copy=True)  # a copy: the file's pages need not stay in memory
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
        drawn = [self._draw(name) for name in names]
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)

    def _draw(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        drawn = torch.empty(shape, device=self._device).normal_(std=self._scale, generator=self._generator)
        return drawn.to(self._dtype)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of ours, [sum of rows, columns]: where a checkpoint keeps it. With `experts` there is one for each,
    stacked. `groups`: into how many its parts are cut where they are interleaved."""

    stored: Stored
    rows: tuple[int, ...]
    columns: int
    biased: bool = False
    experts: int = 0
    groups: int = 1

    def tensors(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names and shapes of what the checkpoint keeps."""
        one = len(self.stored.parts) == 1
        for part, rows in zip(self.stored.parts, (sum(self.rows),) if one else self.rows, strict=True):
            shape = (self.columns, rows) if self.stored.transposed else (rows, self.columns)
            stack = () if "{}" in part or not self.experts else (self.experts,)
            for name in self._expanded(prefix + part):
                yield f"{name}{self.stored.weight}", (*stack, *shape)
                if self.biased:
                    yield f"{name}{self.stored.bias}", (*stack, rows)

    def read(self, weights: "WeightSource", prefix: str) -> tuple[Tensor, Tensor | None]:
        """The matrix and its bias: [experts, rows, columns] and [experts, rows], or without the first dimension."""
        weight = self._take(weights, prefix, self.stored.weight)
        if self.stored.transposed:
            weight = weight.mT
        weight = self._arranged(weight.reshape(*self._stack, sum(self.rows), self.columns), -2)
        if not self.biased:
            return weight, None
        bias = self._take(weights, prefix, self.stored.bias).reshape(*self._stack, sum(self.rows))
        return weight, self._arranged(bias, -1)

    @property
    def _stack(self) -> tuple[int, ...]:
        return (self.experts,) if self.experts else ()

    def _take(self, weights: "WeightSource", prefix: str, ending: str) -> Tensor:
        """All parts, expert after expert."""
        expanded = [self._expanded(prefix + part) for part in self.stored.parts]
        return weights.take(*(f"{name}{ending}" for names in zip(*expanded, strict=True) for name in names))

    def _expanded(self, name: str) -> list[str]:
        return [name.format(expert) for expert in range(self.experts)] if "{}" in name else [name]

    def _arranged(self, tensor: Tensor, dim: int) -> Tensor:
        """Parts one behind the other along `dim`, contiguous."""
        if self.stored.interleaved:
            groups = tensor.unflatten(dim, (self.groups, -1)).split([rows // self.groups for rows in self.rows], dim)
            tensor = torch.cat([part.flatten(dim - 1, dim) for part in groups], dim)
        return tensor.contiguous()


def layer_matrices(spec: ModelSpec, names: LayerNames) -> dict[str, Matrix]:
    """The matrices of a layer, by the fields of LayerNames."""
    hidden, heads, kv_heads = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = (heads, kv_heads, kv_heads)
    matrices = {
        "qkv": Matrix(names.qkv, qkv, hidden, spec.qkv_bias, groups=spec.num_kv_heads),
        "out": Matrix(names.out, (hidden,), heads, spec.out_bias),
    }
    mlp = spec.feed_forward
    count = mlp.count if isinstance(mlp, Experts) else 0
    up = (mlp.width,) if isinstance(mlp, Plain) else (mlp.width, mlp.width)
    matrices["up"] = Matrix(names.up, up, hidden, mlp.biased, count, groups=mlp.width)
    matrices["down"] = Matrix(names.down, (hidden,), mlp.width, mlp.biased, count)
    if isinstance(mlp, Experts):
        matrices["router"] = Matrix(Stored((names.router,)), (count,), hidden, mlp.biased)
        if mlp.shared_width:
            width = mlp.shared_width
            matrices["shared_up"] = Matrix(names.shared_up, (width, width), hidden, groups=width)
            matrices["shared_down"] = Matrix(names.shared_down, (hidden,), width)
            matrices["shared_gate"] = Matrix(Stored((names.shared_gate,)), (1,), hidden)
    return matrices


def layer_norms(spec: ModelSpec) -> tuple[str, ...]:
    """Those of hidden states, by the fields of LayerNames."""
    if spec.block == "sandwich":
        return ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
    return ("attention_norm",) if spec.block == "parallel" else ("attention_norm", "mlp_norm")


def expected_tensors(family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor a checkpoint of this spec must hold, with its shape."""
    spec, names = family.spec, family.names
    yield f"{names.base}{names.embedding}.weight", (spec.vocab_size, spec.embedded_width)
    if isinstance(spec.positions, Learned):
        yield f"{names.base}{names.positions}.weight", (spec.positions.rows, spec.hidden_size)
    if spec.embedding_norm:
        yield from _norm_tensors(spec, names.base + names.embedding_norm)
    if spec.embedding_width:
        yield f"{names.base}{names.project_in}.weight", (spec.hidden_size, spec.embedding_width)
        yield f"{names.base}{names.project_out}.weight", (spec.embedding_width, spec.hidden_size)
    if spec.final_norm:
        yield from _norm_tensors(spec, names.base + names.final_norm)
    if not spec.tied_embeddings:
        yield f"{names.head}.weight", (spec.vocab_size, spec.embedded_width)
    if spec.head_bias:
        yield f"{names.head}.bias", (spec.vocab_size,)
    for layer_id in range(spec.num_layers):
        yield from _layer_tensors(spec, names.layer_names, names.base + names.layer.format(layer_id))


def names_in(family: Family, has: Callable[[str], bool]) -> WeightNames:
    """The family's names, without the first word of their base where the checkpoint leaves it out."""
    names = family.names
    shorter = names.base.partition(".")[2]
    if has(f"{names.base}{names.embedding}.weight") or not has(f"{shorter}{names.embedding}.weight"):
        return names
    return msgspec.structs.replace(names, base=shorter)


def check_tensors(checkpoint: Checkpoint, family: Family) -> None:
    """Refuse missing, leftover and misshapen tensors by name; raises CheckpointError."""
    expected, found = dict(expected_tensors(family)), checkpoint.tensors
    # of a tied pair either will do, and where both are there and differ, both are used, as in transformers
    names, spec = family.names, family.spec
    pair = {f"{names.head}.weight", f"{names.base}{names.embedding}.weight"}
    tied = pair if spec.tied_embeddings else set()
    spare = tied if tied & found.keys() else set()
    missing = [name for name in expected if name not in found and name not in spare]
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: the weights lack {_listed(missing)}, which config.json asks for")
    expected |= dict.fromkeys(tied, (spec.vocab_size, spec.embedded_width))
    leftover = [name for name in found if name not in expected and not name.endswith(names.ignored)]
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


def _layer_tensors(spec: ModelSpec, names: LayerNames, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for norm in layer_norms(spec):
        yield from _norm_tensors(spec, prefix + getattr(names, norm))
    if spec.qk_norm is not None:
        yield f"{prefix}{names.query_norm}.weight", qk_norm_shape(spec, spec.num_heads)
        yield f"{prefix}{names.key_norm}.weight", qk_norm_shape(spec, spec.num_kv_heads)
    if spec.sinks:
        yield prefix + names.sinks, (spec.num_heads,)
    for matrix in layer_matrices(spec, names).values():
        yield from matrix.tensors(prefix)


def qk_norm_shape(spec: ModelSpec, num_heads: int) -> tuple[int, ...]:
    """Of the weight of a norm of so many heads."""
    shapes = {"heads": (spec.head_dim,), "heads_centred": (num_heads, spec.head_dim)}
    return shapes.get(spec.qk_norm or "", (num_heads * spec.head_dim,))


def _norm_tensors(spec: ModelSpec, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (spec.hidden_size,)
    if isinstance(spec.norm, LayerNormSpec) and spec.norm.biased:
        yield f"{name}.bias", (spec.hidden_size,)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"
