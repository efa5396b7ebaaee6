"""Before a GPU worker says that it is ready: every kernel compiled, every graph captured, so that no request waits for
either."""

import time
from typing import Any

import structlog

from kernels.ops import forms
from services.worker.execute.graphs import CudaCapture
from services.worker.execute.runner import Runner
from services.worker.layers.positions import Alibi, Rotary
from services.worker.memory.layout import BlockLayout
from services.worker.models.decoder import Decoder
from services.worker.models.spec import (
    Experts,
    FeedForward,
    Gated,
    LayerNormSpec,
    ModelSpec,
    Positions,
    RmsNormSpec,
)
from shared.config import WorkerConfig

log = structlog.get_logger("warm")


def shape_of(spec: ModelSpec, layout: BlockLayout, max_model_len: int) -> dict[str, Any]:
    """What the kernels' compiled forms depend on: the fields of kernels.fused.declared.ModelShape."""
    return {
        "name": spec.architecture,
        "hidden": spec.hidden_size,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "block_size": layout.block_size,
        "max_model_len": max_model_len,
        "dtype": layout.dtype,
        "windows": tuple(sorted({window for window in spec.windows if window is not None})),
        "num_layers": layout.num_layers,
        "soft_cap": spec.attention_soft_cap,
        "alibi": isinstance(spec.positions, Alibi),
        "sinks": spec.sinks,
        "layer_norm": isinstance(spec.norm, LayerNormSpec),
        "biased_norm": isinstance(spec.norm, LayerNormSpec) and spec.norm.biased,
        "norm_plus_one": isinstance(spec.norm, RmsNormSpec) and spec.norm.plus_one,
        "qk_norm": spec.qk_norm is not None,
        "qk_norm_form": spec.qk_norm or "heads",
        **_rotation_of(spec.positions),
        **_feed_forward_of(spec.feed_forward),
    }


def _rotation_of(positions: Positions) -> dict[str, Any]:
    if not isinstance(positions, Rotary):
        return {"rotary_dim": 0}
    unturned = None in positions.ropes
    return {"rotary_dim": positions.dim, "interleaved_rope": positions.interleaved, "unturned_layers": unturned}


def _feed_forward_of(kind: FeedForward) -> dict[str, Any]:
    if not isinstance(kind, Experts):
        return {"intermediate": kind.width, "activation": kind.activation, "gated": isinstance(kind, Gated)}
    return {
        "intermediate": kind.shared_width,
        "num_experts": kind.count,
        "experts_per_token": kind.top_k,
        "expert_width": kind.width,
        "expert_clamp": kind.clamp,
        "biased_experts": kind.biased,
        "renormalized_experts": kind.renormalize,
    }


def compile_kernels(decoder: Decoder, layout: BlockLayout, max_model_len: int) -> None:
    """Every form that this model's steps may ask for. Minutes the first time, seconds from Triton's cache on disk."""
    began = time.monotonic()
    num_forms = forms.warm(decoder.products(), **shape_of(decoder.spec, layout, max_model_len))
    log.info("kernels_compiled", forms=num_forms, seconds=round(time.monotonic() - began, 1))


def uses_graphs(config: WorkerConfig, device: str) -> bool:
    """Whether steps are replayed from CUDA graphs."""
    return device == "cuda" and not config.enforce_eager


def capture_graphs(runner: Runner, decoder: Decoder, max_num_tokens: int) -> None:
    began = time.monotonic()
    runner.capture_graphs(decoder, CudaCapture(decoder.device), max_num_tokens=max_num_tokens)
    log.info("graphs_ready", seconds=round(time.monotonic() - began, 1))
