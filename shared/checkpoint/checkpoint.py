"""A checkpoint in the layout of Hugging Face: what it is made of, read without torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from shared.checkpoint.errors import CheckpointError
from shared.checkpoint.headers import TensorHeader, read_headers, read_samples
from shared.checkpoint.source import Progress, locate

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Checkpoint(msgspec.Struct, frozen=True):
    """A folder whose configuration and tensor headers were read and agree with each other."""

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, TensorHeader]
    fingerprint: str

    @property
    def dtype(self) -> str:
        """What the weights are kept in, in torch's words: the config's statement, else the first tensor's dtype."""
        stated = self.config.get("dtype") or self.config.get("torch_dtype")
        if isinstance(stated, str):
            return stated.removeprefix("torch.")
        first = next(iter(self.tensors.values()), None)
        if first is None:
            return "float32"
        return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(first.dtype, "float32")


def open_checkpoint(
    model: str | Path, *, revision: str | None = None, progress: Progress | None = None, weights: bool = True
) -> Checkpoint:
    """Locate a checkpoint, read what describes it, and check that its files are all there.

    Without `weights` it has no tensors and no fingerprint, and needs no files for them. Raises CheckpointError naming
    the file that is missing, damaged or of a kind we refuse.
    """
    folder = locate(str(model), revision=revision, progress=progress, weights=weights)
    config = _read_json(folder / "config.json", required=True)
    tensors = _read_tensors(folder) if weights else {}
    return Checkpoint(
        folder=folder,
        config=config,
        generation_config=_read_json(folder / "generation_config.json", required=False),
        tensors=tensors,
        fingerprint=_fingerprint(config, tensors) if weights else "",
    )


def read_config(model: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """config.json alone, for services that need no weights."""
    return _read_json(locate(str(model), revision=revision, weights=False) / "config.json", required=True)


def _read_json(file: Path, *, required: bool) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        if required:
            raise CheckpointError(f"{file} is missing: give the folder of a Hugging Face checkpoint") from None
        return {}
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object: download it again")
    return content


def _read_tensors(folder: Path) -> dict[str, TensorHeader]:
    index = folder / INDEX_FILE
    if index.is_file():
        return _read_sharded(folder, index)
    if (folder / SINGLE_FILE).is_file():
        return read_headers(folder / SINGLE_FILE)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise CheckpointError(
            f"{folder} holds its weights as pickles only (.bin or .pt), which can run code and are refused: "
            "convert them with transformers' save_pretrained, or take a revision with safetensors"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: its weights are missing")


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorHeader]:
    weight_map = _read_json(index, required=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map: download it again")
    tensors: dict[str, TensorHeader] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r}, which lies outside the folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard} is missing, {index.name} names it: download it again")
        for name, header in read_headers(folder / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{folder / shard} holds {name}, which {index.name} does not place there")
            tensors[name] = header
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{folder / shard} lacks the tensor {name} that {index.name} places there")
    return tensors


def _fingerprint(config: dict[str, Any], tensors: dict[str, TensorHeader]) -> str:
    """SHA-256 over the configuration, every tensor's name, dtype, shape and file size, and a few bytes from both ends
    of every tensor: the same on any machine.

    It tells two trainings of one shape apart unless they agree at all those ends; it does not notice damage between.
    """
    sizes = {tensor.file: tensor.file.stat().st_size for tensor in tensors.values()}
    files = {file.name: size for file, size in sizes.items()}
    described = {
        "config": config,
        "tensors": sorted(
            [name, tensor.dtype, list(tensor.shape), tensor.file.name] for name, tensor in tensors.items()
        ),
        "files": files,
        "samples": _samples(tensors),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _samples(tensors: dict[str, TensorHeader]) -> dict[str, str]:
    """Name → bytes in hexadecimal; each file is opened once."""
    by_file: dict[Path, list[TensorHeader]] = {}
    for tensor in tensors.values():
        by_file.setdefault(tensor.file, []).append(tensor)
    return {name: raw.hex() for file, inside in by_file.items() for name, raw in read_samples(file, inside)}
