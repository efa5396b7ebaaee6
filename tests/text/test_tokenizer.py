"""Token ids equal AutoTokenizer's, for every kind of checkpoint."""

import itertools
import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.text.tokenizer import TokenizerError, load_tokenizer
from tests.builders.tokenizers import KINDS, SPECIALS, byte_level, llama2, write_tokenizer

TEXTS = [
    "the quick brown fox",
    " leading and  double  spaces ",
    "def add(a, b):\n    return a + b\n\n",
    "héllo wörld, 你好 🙂 ﬁ \u00a0 e\u0301",
    "<s>not special?</s> <|endoftext|> [CLS] <extra> after",
    "it's they've ISN'T 12345 3.14",
    "",
    "\n",
    "x",
]
NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BERT = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
PLAIN_NORMAL = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}

CASES = {
    "byte_level": (KINDS["byte_level"], {**FAST, **NAMED}),
    "byte_level_unnamed_class": (KINDS["byte_level"], NAMED),
    "flags_are_tokenizer_json_s": (
        KINDS["byte_level"],
        {**FAST, **NAMED, "add_bos_token": False, "add_eos_token": True},
    ),
    "extra_specials": (KINDS["byte_level"], {**FAST, **NAMED, "additional_special_tokens": ["<extra>", "<more>"]}),
    "extra_specials_by_name": (
        KINDS["byte_level"],
        {**FAST, **NAMED, "extra_special_tokens": {"image_token": "<extra>"}},
    ),
    "added_tokens_decoder": (
        KINDS["byte_level"],
        {**FAST, **NAMED, "added_tokens_decoder": {"390": {"content": "<extra>", **PLAIN_NORMAL}}},
    ),
    "special_token_as_object": (
        KINDS["byte_level"],
        {**FAST, **NAMED, "pad_token": {"__type": "AddedToken", "content": "<extra>", **PLAIN_NORMAL}},
    ),
    "special_tokens_map": (KINDS["byte_level"], {**FAST, "special_map": {**NAMED, "pad_token": "<extra>"}}),
    "qwen2": (KINDS["byte_level"], {"tokenizer_class": "Qwen2Tokenizer", "model_type": "qwen2", "eos_token": "</s>"}),
    "qwen2_by_model": (KINDS["byte_level"], {**FAST, "model_type": "qwen2", "eos_token": "</s>"}),
    "qwen3": (KINDS["byte_level"], {"tokenizer_class": "Qwen2TokenizerFast", "model_type": "qwen3"}),
    "qwen3_silent": (KINDS["byte_level"], {"model_type": "qwen3"}),
    "qwen3_fast": (KINDS["byte_level"], {**FAST, "model_type": "qwen3"}),
    "gpt2_class": (KINDS["byte_level"], {"tokenizer_class": "GPT2Tokenizer"}),
    "llama_class": (KINDS["llama2"], {"tokenizer_class": "LlamaTokenizer", **NAMED}),
    "llama_class_fast_legacy": (KINDS["llama2"], {"tokenizer_class": "LlamaTokenizerFast", **NAMED, "legacy": True}),
    "llama_class_no_prefix": (
        KINDS["llama2"],
        {"tokenizer_class": "LlamaTokenizer", **NAMED, "add_prefix_space": False},
    ),
    "llama_as_it_is": (KINDS["llama2"], {**FAST, **NAMED}),
    "mistral": (KINDS["llama2"], {"tokenizer_class": "LlamaTokenizerFast", "model_type": "mistral", **NAMED}),
    "gemma": (KINDS["gemma"], {**FAST, **NAMED}),
    "unigram": (KINDS["unigram"], {**FAST, **NAMED}),
    "wordpiece": (KINDS["wordpiece"], {**FAST, **BERT}),
    "qwen2_split_files": (
        KINDS["byte_level"],
        {"tokenizer_class": "Qwen2Tokenizer", "model_type": "qwen2", "split_files": True},
    ),
    "gpt2_split_files_with_bos": (
        KINDS["byte_level"],
        {"tokenizer_class": "GPT2Tokenizer", "model_type": "gpt2", "split_files": True, "add_bos_token": True},
    ),
}


def auto_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("name", CASES)
def test_ids_and_text_equal_auto_tokenizer(name, tmp_path):
    make, config = CASES[name]
    folder = write_tokenizer(tmp_path / name, make(), **config)
    theirs, ours = auto_tokenizer(folder), load_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        token_ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == token_ids, text
        for skip in (True, False):
            expected = theirs.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(token_ids, skip_special_tokens=skip) == expected
    assert ours.size == max(theirs.get_vocab().values()) + 1
    assert ours.eos_token_id == theirs.eos_token_id


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_text_has_the_same_ids(text, llama_pair):
    ours, theirs = llama_pair
    assert ours.encode(text) == theirs.encode(text)


@pytest.fixture(scope="module")
def llama_pair(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("llama"), llama2(), tokenizer_class="LlamaTokenizer", **NAMED)
    return load_tokenizer(folder), auto_tokenizer(folder)


def test_the_bundled_model_has_the_same_ids():
    folder = Path(__file__).parents[2] / "ops" / "demo_model" / "model"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the bundled model is not there yet")
    theirs, ours = auto_tokenizer(folder), load_tokenizer(folder)
    for text in [*TEXTS, Path(__file__).read_text()]:
        assert ours.encode(text) == theirs.encode(text)


def test_a_tokenizer_json_may_be_named_itself(tmp_path):
    folder = write_tokenizer(tmp_path / "one", byte_level(), **FAST, **NAMED)
    assert load_tokenizer(folder / "tokenizer.json").encode("the fox") == load_tokenizer(folder).encode("the fox")


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    folder = write_tokenizer(tmp_path / "cut", backend, **FAST, **NAMED)
    assert len(load_tokenizer(folder).encode("the quick brown fox jumps over the lazy dog")) > 4


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(TokenizerError, match=r"has no tokenizer.json.*--tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(TokenizerError, match=r"tokenizer.model is not read"):
        load_tokenizer(tmp_path)


def test_vocabulary_files_of_an_unknown_class_are_refused(tmp_path):
    folder = write_tokenizer(tmp_path / "odd", byte_level(), split_files=True, tokenizer_class="OddTokenizer")
    with pytest.raises(TokenizerError, match="OddTokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}', ""])
def test_a_damaged_tokenizer_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"1": {}}},
        {"tokenizer_class": 7},
        {"extra_special_tokens": 7},
    ],
)
def test_a_malformed_configuration_is_refused_by_name(tmp_path, config):
    folder = write_tokenizer(tmp_path / "odd", byte_level(), **config)
    with pytest.raises(TokenizerError, match="odd"):
        load_tokenizer(folder)


def test_a_decoder_that_cannot_stream_is_refused_by_name(tmp_path):
    folder = write_tokenizer(tmp_path / "ctc", byte_level(), **FAST)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["decoder"] = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match="CTC"):
        load_tokenizer(folder)


def test_special_tokens_are_known_by_role(tmp_path):
    folder = write_tokenizer(tmp_path / "roles", byte_level(), **FAST, **NAMED)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.named_tokens == NAMED
    assert tokenizer.texts.special_ids >= {tokenizer.token_id(token) for token in SPECIALS}
    shutil.rmtree(folder)


def test_a_long_text_does_not_hold_up_the_other_threads(tmp_path):
    """One that held the interpreter lock would stop every stream of the router."""
    write_tokenizer(tmp_path, byte_level())
    tokenizer = load_tokenizer(tmp_path)
    text = "def read_lines(path): return [1, 2, 3]\n" * 20_000
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.002)

    ticking = threading.Thread(target=tick)
    ticking.start()
    began = time.perf_counter()
    token_ids = tokenizer.encode(text)
    tokenizer.decode(token_ids)
    took_s = time.perf_counter() - began
    done.set()
    ticking.join()
    worst_s = max(after - before for before, after in itertools.pairwise(ticks))
    assert worst_s < took_s / 3
