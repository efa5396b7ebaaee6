"""Whole decoder steps at real shapes with random weights, in one process and without a scheduler: the engine's ceiling.

`eager` launches every kernel from Python, `graph` replays them from a CUDA graph; both leave sampling out, as an engine
cannot. `graph_sampled` is the graph with the worker's greedy sampling of its logits behind it: the fair ceiling. A
floor is the weights (without the embedding, which is only looked up) and the context's K and V, read once.
"""

from collections.abc import Callable
from typing import Any

import torch

from kernels.ops import sampling
from ops.bench.forward import build_batch
from ops.bench.gpu.device import Device
from ops.bench.gpu.shapes import LLAMA_8B, TOY
from services.worker.memory.layout import layout_of
from services.worker.memory.pool import allocate_pool
from services.worker.models.decoder import Decoder, random_decoder
from services.worker.models.size import sizes_of

BLOCK = 16
NUM_KERNELS = 16


def measure(device: Device, ceilings: dict[str, float]) -> dict[str, Any]:
    """Tokens a second by batch at a context of 1,024, and prompt tokens a second."""
    from kernels.ops import choice

    if device.dry:
        choice.is_fused = lambda tensor: True  # the process ends with the bench
    config = {**LLAMA_8B, **(TOY if device.dry else {})}
    decoder = random_decoder(config, torch.bfloat16, device=device.name)
    batches = [2] if device.dry else [1, 16, 64, 256]
    context = device.size(1024, 20)
    found = {f"decode {batch} x {context}": _decode(device, decoder, batch, context, ceilings) for batch in batches}
    for length in [24] if device.dry else [1024, 4096]:
        found[f"prefill {length}"] = _prefill(device, decoder, length)
    return found


def _decode(device: Device, decoder: Decoder, batch: int, context: int, ceilings: dict[str, float]) -> dict[str, Any]:
    layout = layout_of(decoder.spec, decoder.dtype, BLOCK)
    pool = allocate_pool(layout, batch * layout.blocks_for(context), device.name).pages
    pool.normal_()
    prepared = decoder.prepare(build_batch([(1, context)] * batch, BLOCK, vocab_size=decoder.spec.vocab_size), pool)
    weight_bytes = (sizes_of(decoder.spec).total - decoder.spec.vocab_size * decoder.spec.hidden_size) * 2
    floor_us = (weight_bytes + batch * context * layout.bytes_per_token) / ceilings["memory_gb_per_s"] / 1e3
    eager_us = device.eager_us(lambda: decoder.compute(prepared))
    graph_us = device.median_us([lambda: decoder.compute(prepared)])
    sampled_us = device.median_us([lambda: sampling.best(decoder.compute(prepared))])
    return {
        "floor_us": round(floor_us, 1),
        "eager_us": round(eager_us, 1),
        "graph_us": round(graph_us, 1),
        "graph_tokens_per_s": round(batch * 1e6 / graph_us, 1),
        "graph_sampled_us": round(sampled_us, 1),
        "graph_sampled_tokens_per_s": round(batch * 1e6 / sampled_us, 1),
        "of_floor": round(floor_us / graph_us, 3),
        "kernels_us": _kernels(device, lambda: decoder.compute(prepared)),
    }


def _prefill(device: Device, decoder: Decoder, length: int) -> dict[str, Any]:
    layout = layout_of(decoder.spec, decoder.dtype, BLOCK)
    pool = allocate_pool(layout, layout.blocks_for(length), device.name).pages
    batch = build_batch([(length, length)], BLOCK, vocab_size=decoder.spec.vocab_size)
    took_us = device.eager_us(lambda: decoder.forward(batch, pool), repeats=5)
    return {
        "us": round(took_us, 1),
        "tokens_per_s": round(length * 1e6 / took_us, 1),
        "kernels_us": _kernels(device, lambda: decoder.forward(batch, pool)),
    }


def _kernels(device: Device, call: Callable[[], object]) -> dict[str, list[float]]:
    """What one call spends where: microseconds and launches by the name of the kernel, the dearest first."""
    if device.dry:
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        device.synchronize()
    spent: dict[str, list[float]] = {}
    for event in profile.events():
        total = spent.setdefault(event.name[:60], [0.0, 0])
        total[0], total[1] = total[0] + event.device_time_total, total[1] + 1
    dearest = sorted(spent.items(), key=lambda item: -item[1][0])[:NUM_KERNELS]
    return {name: [round(us, 1), count] for name, (us, count) in dearest}
