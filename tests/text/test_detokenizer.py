"""Text comes out token by token, whole characters only, and adds up to the tokenizer's own decode."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.text.detokenizer import REPLACEMENT, TokenTexts, UnsupportedDecoderError, compile_decoder
from tests.builders.tokenizers import KINDS
from tests.counts import count


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    backend = KINDS[request.param]()
    return backend, TokenTexts(backend)


def streamed(texts, token_ids, prompt_ids=()):
    stream = texts.stream(prompt_ids)
    return [stream.push(token_id) for token_id in token_ids] + [stream.finish()]


def byte_runs_are_sound(backend, token_ids, texts):
    """No run of byte tokens both completes a character and breaks: there we keep what was sent."""
    run = b""
    for token_id in [*token_ids, -1]:
        token = texts.visible(token_id)
        if token_id != -1 and token is None:
            continue
        if token is not None and len(token) == 6 and token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            if any(_decodes(run[:stop]) for stop in range(1, len(run))):
                return False
        run = b""
    return True


def _decodes(data):
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


def test_random_streams_add_up_to_the_full_decode(kind):
    backend, texts = kind
    rng = random.Random(7)
    compared = 0
    for _ in range(count("detokenizer_streams")):
        token_ids = [rng.randrange(-1, texts.size + 3) for _ in range(rng.randrange(1, 24))]
        token_ids = [token_id for token_id in token_ids if token_id >= 0]
        if not byte_runs_are_sound(backend, token_ids, texts):
            continue
        compared += 1
        assert "".join(streamed(texts, token_ids)) == backend.decode(token_ids, skip_special_tokens=True)
    assert compared > count("detokenizer_streams") // 4


@settings(max_examples=80, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_survives_the_round_trip(text):
    backend, texts = ROUND_TRIP
    token_ids = backend.encode(text, add_special_tokens=False).ids
    pieces = streamed(texts, token_ids)
    assert "".join(pieces) == backend.decode(token_ids)
    assert not any(REPLACEMENT in piece for piece in pieces) or REPLACEMENT in text


ROUND_TRIP = (KINDS["byte_level"](), None)
ROUND_TRIP = (ROUND_TRIP[0], TokenTexts(ROUND_TRIP[0]))


@pytest.mark.parametrize("name", ["byte_level", "llama2"])
def test_a_character_of_several_tokens_comes_out_whole(name):
    backend = KINDS[name]()
    texts = TokenTexts(backend)
    token_ids = backend.encode("🙃", add_special_tokens=False).ids
    pieces = streamed(texts, token_ids)
    assert [piece for piece in pieces if piece.strip()] == ["🙃"]
    assert len(token_ids) >= 2


def test_half_a_character_at_the_end_is_a_replacement_as_in_the_full_decode():
    backend = KINDS["byte_level"]()
    token_ids = backend.encode("a🙃", add_special_tokens=False).ids[:-1]
    pieces = streamed(TokenTexts(backend), token_ids)
    assert "".join(pieces[:-1]) == "a"
    assert "".join(pieces) == backend.decode(token_ids) == "a" + REPLACEMENT


def test_byte_tokens_that_break_keep_the_characters_already_sent():
    backend = KINDS["llama2"]()
    texts = TokenTexts(backend)
    token_of = backend.token_to_id
    good = [token_of(f"<0x{byte:02X}>") for byte in "é".encode()]
    pieces = streamed(texts, [*good, token_of("<0xE4>"), token_of("<0x41>"), token_of("the") or token_of("t")])
    assert "".join(pieces).startswith("é" + 2 * REPLACEMENT)


@pytest.mark.parametrize("name", ["llama2", "unigram", "gemma", "byte_level"])
def test_what_follows_a_prompt_keeps_its_leading_space(name):
    backend = KINDS[name]()
    texts = TokenTexts(backend)
    whole = backend.encode("the quick brown fox jumps", add_special_tokens=False).ids
    for cut in range(1, len(whole)):
        prompt, answer = whole[:cut], whole[cut:]
        assert backend.decode(prompt) + "".join(streamed(texts, answer, prompt)) == backend.decode(whole)


def test_the_first_text_after_special_tokens_only_has_no_leading_space():
    backend = KINDS["llama2"]()
    texts = TokenTexts(backend)
    first = backend.encode("fox", add_special_tokens=False).ids
    assert "".join(streamed(texts, first, [1])) == "fox"


def test_a_character_split_between_prompt_and_answer_is_completed():
    backend = KINDS["byte_level"]()
    token_ids = backend.encode("🙃", add_special_tokens=False).ids
    assert "".join(streamed(TokenTexts(backend), token_ids[2:], token_ids[:2])) == "🙃"


def test_special_and_unknown_tokens_have_no_text(kind):
    _, texts = kind
    special = sorted(texts.special_ids)
    assert "".join(streamed(texts, [*special, 10**6, 2**32 - 1])) == ""


def test_each_token_s_own_bytes_are_known():
    level, fallback = TokenTexts(KINDS["byte_level"]()), KINDS["llama2"]()
    byte = next(i for i in range(level.size) if level.token_bytes(i) == b" ")
    assert level.token_bytes(byte) == b" "
    texts = TokenTexts(fallback)
    assert texts.token_bytes(fallback.token_to_id("<0xE4>")) == b"\xe4"
    assert texts.token_bytes(fallback.encode("the", add_special_tokens=False).ids[0]).startswith(b" t")
    assert texts.token_bytes(10**6) == b""


def test_a_token_costs_the_same_however_long_the_stream_is():
    backend = KINDS["llama2"]()
    texts = TokenTexts(backend)
    token_ids = backend.encode("the quick brown fox 🙃 ", add_special_tokens=False).ids
    stream = texts.stream()

    def seconds(rounds):
        begin = time.perf_counter()
        for _ in range(rounds):
            for token_id in token_ids:
                stream.push(token_id)
        return time.perf_counter() - begin

    seconds(50)
    early = min(seconds(200) for _ in range(3))
    seconds(3000)
    late = min(seconds(200) for _ in range(3))
    assert late < 3 * early


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "BPEDecoder", "suffix": "</w>"},
        {
            "type": "Sequence",
            "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "ab"}, "content": ""}],
        },
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "WordPiece", "prefix": "##", "cleanup": True}]},
    ],
)
def test_a_decoder_that_needs_the_future_is_refused(spec):
    with pytest.raises(UnsupportedDecoderError):
        compile_decoder(spec)


def test_strip_after_fuse_works_on_the_whole_text():
    from tokenizers import decoders

    backend = KINDS["gemma"]()
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 1)]
    backend.decoder = decoders.Sequence(parts)
    texts = TokenTexts(backend)
    for text in ["   two  spaces   ", "none", "a b "]:  # tokenizers panics on a text shorter than the strip
        token_ids = backend.encode(text, add_special_tokens=False).ids
        assert "".join(streamed(texts, token_ids)) == backend.decode(token_ids)


def test_special_tokens_that_are_shown_have_their_names_and_others_no_text():
    backend = KINDS["llama2"]()
    texts = TokenTexts(backend)
    begin, end, word = backend.token_to_id("<s>"), backend.token_to_id("</s>"), backend.encode("dog").ids[-1]
    stream = texts.stream(shown=frozenset({end}))
    assert "".join(map(stream.push, (begin, word, end, begin))).endswith(f"{texts.visible(word)}</s>".lstrip("\u2581"))
    assert texts.stream().push(end) == ""
