"""The training loop: Muon and AdamW, rates by the clock, checkpoints and held-out losses along the way."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ops.demo_model import evaluation
from ops.demo_model.settings import WORK, Settings, Shape
from ops.demo_model.tokens import Corpus, Stream

Loss = Callable[[LlamaForCausalLM, torch.Tensor, torch.Tensor], torch.Tensor]


def build(shape: Shape, settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make an untrained Llama."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=64,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def logits_of(model: LlamaForCausalLM, inputs: torch.Tensor) -> torch.Tensor:
    """Return float32 logits [rows, length, vocabulary], computed in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=inputs, use_cache=False).logits.float()


def next_token_loss(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats per token."""
    return functional.cross_entropy(logits_of(model, inputs).flatten(0, 1), targets.flatten())


def distillation_loss(teacher: LlamaForCausalLM) -> Loss:
    """Make a loss that draws a draft to its teacher: divergence plus the share of tokens it would have rejected."""

    def loss(model: LlamaForCausalLM, inputs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = functional.log_softmax(logits_of(teacher, inputs), dim=-1).detach()
        guessed = functional.log_softmax(logits_of(model, inputs), dim=-1)
        probability = wanted.exp()
        divergence = (probability * (wanted - guessed)).sum(-1).mean()
        accepted = torch.minimum(probability, guessed.exp()).sum(-1).mean()
        return divergence + 1 - accepted

    return loss


def inherit_embedding(draft: LlamaForCausalLM, teacher: LlamaForCausalLM) -> None:
    """Start the draft from the principal directions of its teacher's embedding."""
    weight = teacher.get_input_embeddings().weight.detach().float()
    left, scale, _ = torch.linalg.svd(weight, full_matrices=False)
    own = draft.get_input_embeddings().weight
    reduced = (left * scale)[:, : own.shape[1]]
    with torch.no_grad():
        own.copy_(reduced * (0.03 / reduced.std()))


def optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Give the layers' matrices to Muon, the embedding and the norms to AdamW."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=settings.matrix_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.vector_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(progress: float, warmup: float) -> float:
    """Return the learning rate's factor: up in a line, down to zero in a cosine."""
    if progress < warmup:
        return 0.02 + 0.98 * progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


@dataclass
class History:
    """What a run has seen: training losses [seconds, tokens, nats] and held-out losses by kind."""

    train: list[tuple[float, int, float]] = field(default_factory=list)
    held_out: list[tuple[float, int, dict[str, float]]] = field(default_factory=list)


class Trainer:
    """Trains one model for a number of seconds."""

    def __init__(
        self, name: str, model: LlamaForCausalLM, loss: Loss, data: Corpus, settings: Settings, seconds: float
    ) -> None:
        self.name, self.model, self.settings, self.seconds = name, model, settings, seconds
        self.history = History()
        self.tokens = 0
        self._data = data
        self._loss = torch.compile(loss, dynamic=False) if settings.compile else loss
        self._optimizers = optimizers(model, settings)
        self._rates = [group["lr"] for optimizer in self._optimizers for group in optimizer.param_groups]
        self._stream = Stream(data, settings)
        self._before = 0.0  # seconds spent before this process resumed the run
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Return the seconds that the run has taken, all processes together."""
        return self._before + time.monotonic() - self._started

    def run(self, save: Callable[[LlamaForCausalLM], None]) -> None:
        """Train until the time is over, saving and evaluating along the way."""
        self._started = time.monotonic()
        saved = evaluated = self.elapsed
        while self.elapsed < self.seconds:
            self._step()
            if self.elapsed - evaluated > self.settings.evaluation_seconds:
                self._evaluate()
                evaluated = self.elapsed
            if self.elapsed - saved > self.settings.checkpoint_seconds:
                self._checkpoint()
                save(self.model)
                saved = self.elapsed
        self._evaluate()
        self._checkpoint()
        save(self.model)

    def resume(self) -> None:
        """Take up the last checkpoint, if there is one."""
        path = WORK / f"{self.name}.pt"
        if not path.exists():
            return
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.history = History(**state["history"])
        self.tokens, self._before = state["tokens"], state["elapsed"]
        self._stream = Stream(self._data, self.settings, state["epoch"])

    def _step(self) -> None:
        """Read one batch and update the weights."""
        settings, progress = self.settings, self.elapsed / self.seconds
        length = settings.long if progress > settings.long_from else settings.short
        inputs, targets = self._stream.batch(settings.batch_tokens // length, length)
        self._set_rates(rate(progress, settings.warmup))
        loss = self._loss(self.model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.tokens += inputs.numel()
        self.history.train.append((self.elapsed, self.tokens, loss.item()))
        if len(self.history.train) % 20 == 1:
            recent = [entry[2] for entry in self.history.train[-20:]]
            mean = sum(recent) / len(recent)
            speed = self.tokens / self.elapsed
            print(f"{self.name} {progress:6.1%} {self.tokens:>9} tokens {speed:5.0f}/s {mean:.3f} nats", flush=True)

    def _set_rates(self, factor: float) -> None:
        """Scale every learning rate by the schedule's factor."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, full in zip(groups, self._rates, strict=True):
            group["lr"] = full * factor

    def _evaluate(self) -> None:
        """Note the held-out losses."""
        limit = self.settings.evaluation_tokens
        losses = evaluation.losses(self.model, self._data, self.settings.short, limit)
        nats = {kind: loss.nats_per_token for kind, loss in losses.items()}
        self.history.held_out.append((self.elapsed, self.tokens, nats))
        print(f"{self.name} held out: {json.dumps({k: round(v, 3) for k, v in nats.items()})}", flush=True)

    def _checkpoint(self) -> None:
        """Write everything that the run needs to go on."""
        WORK.mkdir(exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "history": vars(self.history),
            "tokens": self.tokens,
            "elapsed": self.elapsed,
            "epoch": self._stream.epoch,
        }
        partial = WORK / f"{self.name}.pt.partial"
        torch.save(state, partial)
        os.replace(partial, WORK / f"{self.name}.pt")


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a complete Hugging Face checkpoint in bfloat16; each file is replaced at once."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    staging = WORK / f"export-{folder.name}"
    stored.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    folder.mkdir(exist_ok=True)
    for path in staging.iterdir():
        path.chmod(0o644)  # save_pretrained leaves the weights readable by their owner alone
        os.replace(path, folder / path.name)
