"""Folders: what is read, and what is refused with the name of the file."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared.checkpoint import CheckpointError, open_checkpoint
from shared.checkpoint.headers import SAMPLE_BYTES, read_samples
from tests.checkpoint.builders import write_checkpoint


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_found_in_one_file_or_in_shards(tmp_path, shards):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, shards=shards))
    assert sorted(checkpoint.tensors) == [f"tensor.{index}" for index in range(4)]
    assert checkpoint.tensors["tensor.2"].shape == (3, 3)
    assert checkpoint.tensors["tensor.2"].dtype == "F32"
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.generation_config == {}


def test_the_dtype_is_that_of_the_weights_where_the_config_is_silent(tmp_path):
    assert open_checkpoint(write_checkpoint(tmp_path, torch_dtype=None)).dtype == "float32"


def test_a_generation_config_is_noticed(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.generation_config == {"temperature": 0.6}


def test_the_fingerprint_knows_a_checkpoint_anywhere_and_no_other(tmp_path):
    here = open_checkpoint(write_checkpoint(tmp_path / "here")).fingerprint
    assert here == open_checkpoint(write_checkpoint(tmp_path / "there")).fingerprint
    assert len(here) == 64
    others = [
        open_checkpoint(write_checkpoint(tmp_path / "config", vocab_size=9)).fingerprint,
        open_checkpoint(write_checkpoint(tmp_path / "tensors", tensors=5)).fingerprint,
        open_checkpoint(write_checkpoint(tmp_path / "shards", shards=2)).fingerprint,
    ]
    assert len({here, *others}) == 4


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("name", ["tensor.0", "tensor.3"])
def test_the_fingerprint_tells_two_trainings_of_one_shape_apart(tmp_path, shards, at, name):
    """One byte at either end of a tensor, anywhere in the files."""
    before = open_checkpoint(write_checkpoint(tmp_path, shards=shards))
    tensor = before.tensors[name]
    content = bytearray(tensor.file.read_bytes())
    content[tensor.start if at == "start" else tensor.end - 1] ^= 1
    tensor.file.write_bytes(content)
    after = open_checkpoint(tmp_path)
    assert after.tensors == before.tensors
    assert after.fingerprint != before.fingerprint


def test_the_fingerprint_reads_little_of_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"large": np.zeros(100_000, np.float32)}, tmp_path / "model.safetensors")
    tensor = open_checkpoint(tmp_path).tensors["large"]
    ((name, sample),) = read_samples(tensor.file, [tensor])
    assert (name, len(sample)) == ("large", 2 * SAMPLE_BYTES)


@pytest.mark.parametrize("offsets", [[-4, 96], [12, 0], ["a", 96], [96]])
def test_a_tensor_that_lies_nowhere(tmp_path, offsets):
    header = json.dumps({"t": {"dtype": "U8", "shape": [96], "data_offsets": offsets}})
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(96))
    refused(tmp_path, str(file), "damaged")


def refused(folder, *parts):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "there is no folder", "nowhere")


def test_a_file_instead_of_a_folder(tmp_path):
    write_checkpoint(tmp_path)
    refused(tmp_path / "model.safetensors", "is a file")


def test_a_folder_without_config(tmp_path):
    refused(tmp_path, "config.json is missing")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_config(tmp_path, content):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, "config.json")


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "model.safetensors", "missing")


def test_weights_in_pickles_only(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, ".bin", "safetensors")


@pytest.mark.parametrize("kept_bytes", [0, 4, 8, 30, -1])
def test_a_truncated_file(tmp_path, kept_bytes):
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    refused(tmp_path, str(file))


def test_a_file_that_goes_on_after_its_last_tensor(tmp_path):
    file = write_checkpoint(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    refused(tmp_path, str(file), "4 bytes after")


def test_a_header_that_is_not_json(tmp_path):
    file = write_checkpoint(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:8] + b"?" + content[9:])
    refused(tmp_path, str(file), "damaged")


def test_a_missing_shard(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors", "missing")


def edit_index(folder, edit):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))


def test_an_index_that_names_a_tensor_nobody_has(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    edit_index(tmp_path, lambda names: names.update(ghost="model-00001-of-00002.safetensors"))
    refused(tmp_path, "ghost", "model-00001-of-00002.safetensors")


def test_an_index_that_forgets_a_tensor(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    edit_index(tmp_path, lambda names: names.pop("tensor.3"))
    refused(tmp_path, "tensor.3", "model-00002-of-00002.safetensors")


def test_an_index_that_leads_out_of_the_folder(tmp_path):
    write_checkpoint(tmp_path, shards=2)
    edit_index(tmp_path, lambda names: names.update({"tensor.0": "../model.safetensors"}))
    refused(tmp_path, "outside")


def test_reading_a_checkpoint_needs_no_torch(tmp_path):
    write_checkpoint(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from shared.checkpoint import open_checkpoint\n"
        f"print(open_checkpoint({str(tmp_path)!r}).dtype)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "bfloat16"
