"""The bundled checkpoints are what the README says: small, complete, and loadable by transformers."""

import json
import random

import pytest
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from ops.demo_model import corpus  # noqa: E402
from ops.demo_model.settings import HERE, Settings  # noqa: E402

MODEL, DRAFT = HERE / "model", HERE / "draft"


@pytest.mark.parametrize("folder", [MODEL, DRAFT], ids=["model", "draft"])
def test_checkpoint_loads_and_is_small(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.head_dim == 64 and model.config.tie_word_embeddings
    assert model.config.vocab_size == Settings().vocabulary
    assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20


def test_both_share_one_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (MODEL / name).read_bytes() == (DRAFT / name).read_bytes()


TEXTS = ["naïve 北京 🙂\u200d\n\t  x", "".join(map(chr, range(0x2000))), "  def f():\r\n", ""]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_comes_back(text):
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id("<|bos|>")
    assert tokenizer.decode(ids) == text


def test_chat_template():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    chat = corpus.Chat("Return one.", "def one():\n    return 1", "Be brief.").messages()
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == ("<|bos|><|system|>Be brief.<|user|>Return one.<|assistant|>def one():\n    return 1<|eos|>")
    opened = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(opened).endswith("<|assistant|>")


def test_model_has_learned_python():
    """A model that knows nothing has a perplexity of 4096."""
    results = json.loads((HERE / "results.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer((HERE / "corpus.py").read_text(), return_tensors="pt").input_ids[:, :512]
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 1.6 * results["model"]["held_out"]["library"]["nats_per_token"]


def test_split_and_pieces():
    assert corpus.held_out("a.py", 1, 1.0) and not corpus.held_out("a.py", 1, 0.0)
    text = "import os\n\n@cache\ndef f():\n    pass\n\ndef g():\n    pass\n"
    cut = corpus.pieces(text, 30)
    assert "".join("".join(cut).split()) == "".join(text.split()) and len(cut) == 2 + (len(cut) > 2)
    assert all(piece.startswith(("import", "@cache", "def g")) for piece in cut)


def test_functions_become_chats():
    text = 'class A:\n    def one(self):\n        """Return one. Always."""\n        return 1\n'
    source = corpus.Source("x.py", text, is_test=False, held_out=False)
    (function,) = corpus.functions(source)
    assert function.is_method and function.signature == "one(self)" and function.code.startswith("def one")
    asked = corpus.chats(function, random.Random(0), 3)
    assert len({chat.user for chat in asked}) == 3 and all(chat.assistant == function.code for chat in asked)
