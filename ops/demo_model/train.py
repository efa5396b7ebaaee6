"""Train the bundled model and its draft: `python -m ops.demo_model.train` from the root of the repository."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from ops.demo_model import corpus, evaluation, plot, tokens, training, vocabulary
from ops.demo_model.settings import HERE, WORK, Settings

MODEL, DRAFT = HERE / "model", HERE / "draft"
Prepared = tuple[PreTrainedTokenizerFast, tokens.Corpus]


def prepare(settings: Settings) -> Prepared:
    """Read the library, train the tokenizer and tokenize; the same interpreter gives the same result."""
    sources = corpus.sources(settings.seed, settings.held_out)
    texts = tokens.tokenizer_texts(sources)
    tokenizer = vocabulary.train_tokenizer(texts, settings.vocabulary, settings.positions)
    data = tokens.build(sources, tokenizer, settings)
    print(json.dumps(data.size()), flush=True)
    return tokenizer, data


def train_model(options: argparse.Namespace, settings: Settings, prepared: Prepared) -> None:
    """Train the model and write its checkpoint folder."""
    tokenizer, data = prepared
    model = training.build(settings.model, settings, tokenizer)
    trainer = training.Trainer("model", model, training.next_token_loss, data, settings, options.minutes * 60)
    if options.resume:
        trainer.resume()
    trainer.run(lambda trained: training.export(trained, tokenizer, MODEL))
    _note(trainer)


def train_draft(options: argparse.Namespace, settings: Settings, prepared: Prepared) -> None:
    """Distil the draft from the finished model and write its checkpoint folder."""
    tokenizer, data = prepared
    teacher = load(MODEL)
    settings = dataclasses.replace(settings, batch_tokens=settings.draft_batch_tokens)
    draft = training.build(settings.draft, settings, tokenizer)
    training.inherit_embedding(draft, teacher)
    loss = training.distillation_loss(teacher)
    trainer = training.Trainer("draft", draft, loss, data, settings, options.draft_minutes * 60)
    if options.resume:
        trainer.resume()
    trainer.run(lambda trained: training.export(trained, tokenizer, DRAFT))
    _note(trainer)


def report(options: argparse.Namespace, settings: Settings, prepared: Prepared) -> None:
    """Measure the two checkpoints as they are stored; write results.json and loss.png."""
    _, data = prepared
    model, draft = load(MODEL), load(DRAFT)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    length, limit = 1024, options.report_tokens
    results = {
        "date": options.date or datetime.date.today().isoformat(),
        "device": _device(settings),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "settings": dataclasses.asdict(settings),
        "data_tokens": data.size(),
        "held_out_window_tokens": length,
        "model": _measure("model", model, MODEL, evaluation.losses(model, data, length, limit)),
        "draft": _measure("draft", draft, DRAFT, evaluation.losses(draft, data, length, limit)),
        "acceptance": evaluation.acceptance(model, draft, data, length, limit),
        "samples": evaluation.samples(model, tokenizer),
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    plot.curves({name: _noted(name) for name in ("model", "draft")}, HERE / "loss.png")


def load(folder: Path) -> LlamaForCausalLM:
    """Load a stored checkpoint for computing in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _measure(name: str, model: LlamaForCausalLM, folder: Path, losses: dict[str, evaluation.HeldOut]) -> dict[str, Any]:
    """Describe one trained model: sizes, time and held-out losses."""
    noted = _noted(name)
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "safetensors_bytes": (folder / "model.safetensors").stat().st_size,
        "training_seconds": round(noted["seconds"]),
        "training_tokens": noted["tokens"],
        "steps": len(noted["train"]),
        "held_out": {kind: loss.report() for kind, loss in losses.items()}
        | {"all": evaluation.together(losses).report()},
    }


def _note(trainer: training.Trainer) -> None:
    """Keep what the report needs of a finished run."""
    noted = vars(trainer.history) | {"seconds": trainer.elapsed, "tokens": trainer.tokens}
    (WORK / f"{trainer.name}.json").write_text(json.dumps(noted))


def _noted(name: str) -> dict[str, Any]:
    """Read what a finished run has noted."""
    return json.loads((WORK / f"{name}.json").read_text())


def _device(settings: Settings) -> str:
    """Name the processor and the threads used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {settings.threads} threads"


def main() -> None:
    """Run the stages that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=43, help="wall time for the model")
    parser.add_argument("--draft-minutes", type=float, default=10, help="wall time for the draft")
    parser.add_argument("--report-tokens", type=int, default=98_304, help="held-out tokens of each kind to measure")
    parser.add_argument("--stages", nargs="+", choices=["model", "draft", "report"])
    parser.add_argument("--resume", action="store_true", help="go on from work/*.pt")
    parser.add_argument("--date", help="the date to note in results.json; today by default")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile and a C++ compiler")
    options = parser.parse_args()
    settings = Settings(compile=not options.no_compile)
    torch.set_num_threads(settings.threads)
    WORK.mkdir(exist_ok=True)
    stages = {"model": train_model, "draft": train_draft, "report": report}
    prepared = prepare(settings)
    for name in options.stages or stages:
        stages[name](options, settings, prepared)


if __name__ == "__main__":
    main()
