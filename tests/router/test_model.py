"""What the edge reads of a checkpoint."""

import json
from typing import get_args

import msgspec
import pytest
import structlog

from services.router.model import UNSTATED_LENGTH, ModelError, load_model
from services.router.parsing.families import THINKING, TOOL_CALLS
from shared.checkpoint import BUNDLED_FOLDER, CheckpointError, open_checkpoint
from shared.config import ConfigError, RouterConfig, load_config
from tests.builders.tiny_text import write_tiny_model
from tests.builders.tool_text import LLAMA3, MISTRAL, QWEN3, R1, write_tool_model


def load(folder, **settings):
    return load_model(RouterConfig(model=str(folder), **settings))


def edit(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_a_model_is_named_after_its_folder_unless_names_are_given(tmp_path):
    folder = write_tiny_model(tmp_path / "my-model")
    assert load(folder).names == ("my-model",)
    assert load(folder, served_model_name=("a", "b")).names == ("a", "b")


def test_end_of_sequence_comes_from_generation_config_then_config_then_tokenizer(tmp_path):
    folder = write_tiny_model(tmp_path / "m", generation={"eos_token_id": [2, 3]})
    assert load(folder).eos_token_ids == {2, 3}
    (folder / "generation_config.json").unlink()
    assert load(folder).eos_token_ids == {1}
    edit(folder, "config.json", eos_token_id=None)
    assert load(folder).eos_token_ids == {load(folder).tokenizer.eos_token_id}


def test_a_default_outside_our_limits_is_named_and_left_out(tmp_path):
    folder = write_tiny_model(tmp_path / "m", generation={"temperature": 99, "top_k": 5, "top_p": True, "min_p": None})
    with structlog.testing.capture_logs() as logs:
        defaults = load(folder).defaults
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p) == (None, 5, None, None)
    assert [entry["field"] for entry in logs if entry["event"] == "default_ignored"] == ["temperature"]


def test_the_bundled_model_carries_the_fingerprint_that_workers_report():
    if not (BUNDLED_FOLDER / "model.safetensors").is_file():
        pytest.skip("the bundled model is not there yet")
    model = load_model(RouterConfig())
    assert model.fingerprint == open_checkpoint(BUNDLED_FOLDER).fingerprint != ""
    assert model.names == ("bundled",)
    assert model.chat_template is not None
    assert model.tokenizer.size <= model.vocab_size


def test_another_tokenizer_may_be_named(tmp_path):
    folder = write_tiny_model(tmp_path / "m")
    other = write_tiny_model(tmp_path / "other", chat=False)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="--tokenizer"):
        load(folder)
    model = load(folder, tokenizer=str(other))
    assert model.tokenizer.encode("the fox")
    assert model.chat_template is None
    assert load(folder, tokenizer=str(other / "tokenizer.json")).chat_template is not None


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("config.json", None, CheckpointError),
        ("config.json", "{", ModelError),
        ("generation_config.json", "[", CheckpointError),
        ("tokenizer_config.json", "{", ModelError),
        ("tokenizer.json", "{}", ModelError),
        ("chat_template.jinja", "{% for %}", ModelError),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, error):
    folder = write_tiny_model(tmp_path / "m")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(error, match=name.replace("chat_template.jinja", "chat template")):
        load(folder)


@pytest.mark.parametrize(("key", "value"), [("vocab_size", None), ("vocab_size", 0), ("max_position_embeddings", -1)])
def test_a_config_without_its_sizes_is_refused_by_name(tmp_path, key, value):
    folder = edit(write_tiny_model(tmp_path / "m"), "config.json", **{key: value})
    with pytest.raises(ModelError, match=key):
        load(folder)


@pytest.mark.parametrize(("key", "length"), [("n_positions", 77), ("max_seq_len", 78), ("seq_length", 79)])
def test_the_longest_context_may_go_by_other_names_and_is_left_to_the_workers_where_it_has_none(tmp_path, key, length):
    folder = edit(write_tiny_model(tmp_path / "m"), "config.json", max_position_embeddings=None)
    assert load(folder).max_model_len == UNSTATED_LENGTH
    assert load(edit(folder, "config.json", **{key: length})).max_model_len == length


@pytest.mark.parametrize(
    ("template", "tool_calls", "thinking"),
    [
        (QWEN3, "hermes", "qwen3"),
        (LLAMA3, "llama3_json", ""),
        (MISTRAL, "mistral", ""),
        (R1, "", "deepseek_r1"),
        ("{{ tools }}<tool_call><function=f>", "qwen3_coder", ""),
        ("{{ tools }}<tool_call>{{ name }}<arg_key>{{ key }}</arg_key><think></think>", "glm45", "qwen3"),
        ("<\uff5ctool\u2581call\u2581begin\uff5c>function```json", "deepseek_v3", ""),
        ("<\uff5ctool\u2581call\u2581begin\uff5c><\uff5cAssistant\uff5c><think>", "deepseek_v31", "deepseek_r1"),
        ("<|tool_calls_section_begin|>{{ call.id }}", "kimi_k2", ""),
        ("<|start|>assistant<|channel|>final<|message|>", "openai", "openai_gptoss"),
        ("{{ messages }}", "", ""),
        ("{% if thinking %}<think>{% else %}</think>{% endif %}", "", "qwen3"),
        ("[TOOL_CALLS][THINK]", "mistral", "mistral"),
        ("Use exact format: [func_name1(param1=value1), func_name2(...)]", "pythonic", ""),
    ],
)
def test_the_parsers_are_those_that_the_chat_template_speaks_or_the_flags_name(
    tmp_path, template, tool_calls, thinking
):
    folder = write_tool_model(tmp_path / "m", template)
    with structlog.testing.capture_logs() as logs:
        model = load(folder)
    assert (model.tool_calls, model.thinking) == (TOOL_CALLS.get(tool_calls), THINKING.get(thinking))
    [told] = [line for line in logs if line["event"] == "parsers"]
    assert (told["tool_call_parser"], told["reasoning_parser"]) == (tool_calls or "none", thinking or "none")
    named = load(folder, tool_call_parser="mistral", reasoning_parser="none")
    assert (named.tool_calls, named.thinking) == (TOOL_CALLS["mistral"], None)


def test_every_parser_can_be_named_by_its_flag():
    fields = {field.name: field.type for field in msgspec.structs.fields(RouterConfig)}
    assert set(get_args(fields["tool_call_parser"])) == {"auto", "none", *TOOL_CALLS}
    assert set(get_args(fields["reasoning_parser"])) == {"auto", "none", *THINKING}
    with pytest.raises(ConfigError, match=r"--tool-call-parser: .*gemini"):
        load_config(RouterConfig, section="router", file="", environ={}, flags={"tool_call_parser": "gemini"})
