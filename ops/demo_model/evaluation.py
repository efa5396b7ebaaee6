"""What the models are worth: held-out loss, the draft's acceptance, and samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ops.demo_model.tokens import Corpus, windows

PROMPTS = (
    "def fibonacci(n):",
    "import os\n",
    "class Stack:\n",
    'def read_lines(path):\n    """Return the file\'s lines."""\n',
)
QUESTIONS = (
    "Return the sum of two numbers.",
    "Return the greatest common divisor of a and b.",
    "Return true if the pathname refers to an existing directory.",
    "Write a function that does this: close the file.",
)


@dataclass(frozen=True)
class HeldOut:
    """A held-out loss: nats per token, over so many tokens that stand for so many bytes of text."""

    nats_per_token: float
    tokens: int
    bytes: int

    def report(self) -> dict[str, float]:
        """Return the loss in its usual units."""
        bits = self.nats_per_token * self.tokens / math.log(2)
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nats_per_token": round(self.nats_per_token, 4),
            "perplexity_per_token": round(math.exp(self.nats_per_token), 3),
            "bits_per_byte": round(bits / self.bytes, 4),
        }


@torch.inference_mode()
def losses(model: LlamaForCausalLM, data: Corpus, length: int, limit: int) -> dict[str, HeldOut]:
    """Measure each kind of held-out text in windows of `length` tokens, at most `limit` tokens of each."""
    found = {}
    for kind, ids in data.held_out.items():
        inputs, targets = windows(ids, length, limit)
        total = 0.0
        for row, target in zip(inputs.split(4), targets.split(4), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=row, use_cache=False).logits.float()
            total += functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
        size = int(torch.from_numpy(data.token_bytes.astype("int64"))[targets].sum())
        found[kind] = HeldOut(total / targets.numel(), targets.numel(), size)
    return found


def together(parts: dict[str, HeldOut]) -> HeldOut:
    """Join losses, each weighed by its tokens."""
    tokens = sum(part.tokens for part in parts.values())
    nats = sum(part.nats_per_token * part.tokens for part in parts.values())
    return HeldOut(nats / tokens, tokens, sum(part.bytes for part in parts.values()))


@torch.inference_mode()
def acceptance(
    model: LlamaForCausalLM, draft: LlamaForCausalLM, data: Corpus, length: int, limit: int
) -> dict[str, dict[str, float]]:
    """Compare the draft with the model on held-out text, position by position.

    `sampled` is the mean over positions of the sum over the vocabulary of min(p, q), at temperature 1;
    `greedy` is the share of positions where both like the same token best. Both are shares of one.
    """
    found = {}
    for kind, ids in data.held_out.items():
        inputs, _ = windows(ids, length, limit)
        sampled = greedy = 0.0
        for rows in inputs.split(4):
            wanted, guessed = (m(input_ids=rows, use_cache=False).logits.float() for m in (model, draft))
            sampled += torch.minimum(wanted.softmax(-1), guessed.softmax(-1)).sum().item()
            greedy += (wanted.argmax(-1) == guessed.argmax(-1)).sum().item()
        count = inputs.numel()
        found[kind] = {"tokens": count, "sampled": round(sampled / count, 4), "greedy": round(greedy / count, 4)}
    return found


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, str | bool]]:
    """Continue every prompt and answer every question, greedily and sampled at temperature 0.7."""
    asked = [(prompt, tokenizer(prompt, return_tensors="pt").input_ids) for prompt in PROMPTS]
    for question in QUESTIONS:
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        asked.append((text, tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids))
    return [_sample(model, tokenizer, text, ids, temperature) for text, ids in asked for temperature in (0.0, 0.7)]


@torch.inference_mode()
def _sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, ids: torch.Tensor, temperature: float
) -> dict[str, str | bool]:
    """Generate at most 120 tokens after the prompt."""
    torch.manual_seed(0)
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    mask = torch.ones_like(ids)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=120, **how)[0, ids.shape[1] :]
    ended = output[-1].item() == tokenizer.eos_token_id
    answer = tokenizer.decode(output, skip_special_tokens=True)
    return {"prompt": text, "temperature": str(temperature), "text": answer, "ended_with_eos": ended}
