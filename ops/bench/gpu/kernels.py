"""Each kernel beside its floor and the best that this machine has otherwise; shapes are Llama-3.1-8B's.

A floor is the larger of bytes over the measured memory bandwidth and operations over the measured matrix rate. A peer
that this machine lacks, or that cannot do a case, is left out by name. `eager` of the norm is torch's own fused
one; `transformers` is written operation by operation, as transformers has it, and so are the `eager` of gate and rope.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.fused import activation, attention, experts, linear, noise, norm, rope, sampling
from ops.bench.gpu.device import Device

HEADS, KV_HEADS, DIM, BLOCK, HIDDEN, INTERMEDIATE, VOCAB = 32, 8, 128, 16, 4096, 14336, 128_256
LAYERS = 8
"""Of a pool whose pages hold several."""
WEIGHTS = {
    "QKV": ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
    "O": (HIDDEN, HEADS * DIM),
    "gate-up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "lm_head": (VOCAB, HIDDEN),
}
"""[out_features, in_features] of each product of a step."""


@dataclass(slots=True)
class Case:
    """One kernel on one shape: `num_bytes` that must move and `num_flops` that must be done, at least.

    `make` builds fresh inputs and returns calls by name, ours first.
    """

    name: str
    num_bytes: float
    num_flops: float
    make: Callable[[Device], dict[str, Callable[[], object]]]
    limits: dict[str, float] = field(default_factory=dict)


def measure(device: Device, ceilings: dict[str, float]) -> dict[str, Any]:
    """By case: microseconds by name, the floor, and the share of it that we reach."""
    found = {}
    for case in cases(device):
        try:
            found[case.name] = _measure(device, case, ceilings)
        except Exception as error:  # one kernel that fails must not cost the others their figures
            found[case.name] = {"error": f"{type(error).__name__}: {error}"[:400]}
    return found


def _measure(device: Device, case: Case, ceilings: dict[str, float]) -> dict[str, Any]:
    floor_us = max(
        case.num_bytes / ceilings["memory_gb_per_s"] / 1e3, case.num_flops / ceilings["matmul_bf16_tflop_per_s"] / 1e6
    )
    sets = [case.make(device) for _ in range(device.num_sets(int(case.num_bytes)))]
    result: dict[str, Any] = {"floor_us": round(floor_us, 2)}
    for name in sets[0]:
        try:
            result[f"{name}_us"] = round(device.median_us([each[name] for each in sets]), 2)
        except Exception as error:
            if name == "ours":
                raise
            result[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
    result["of_floor"] = round(floor_us / result["ours_us"], 3)
    own = ("floor_us", "ours_us", "exact_us")
    peers = [value for key, value in result.items() if key.endswith("_us") and key not in own]
    if peers:
        result["over_best_peer"] = round(min(peers) / result["ours_us"], 3)
    if "transformers_us" in result:
        result["over_transformers"] = round(result["transformers_us"] / result["ours_us"], 3)
    return result


def cases(device: Device) -> Iterator[Case]:
    yield from _elementwise(device.size(8192, 3))
    for rows in (1, 16, 64, 256, 2048):
        for name, (out_features, in_features) in WEIGHTS.items():
            yield _product(name, device.size(rows, 2), device.size(out_features, 64), device.size(in_features, 64))
        if device.dry:
            break
    yield from _samplings(device.size(256, 2), device.size(VOCAB, 300))
    yield _experts(device.size(256, 3), device.size(128, 4), device.size(2048, 64), device.size(768, 32))
    for batch, context in [(64, 1024), (8, 8192), (64, 8192), (1, 8192), (1, 32768), (256, 1024)]:
        yield _decode([context // device.size(1, 64)] * device.size(batch, 2))
        if device.dry:
            break
    yield _layouts(device.size(64, 2), device.size(1024, 24))
    yield _decode([64, 256, 1024, 2048, 4096, 8192, 16384] * 4 if not device.dry else [3, 40], "ragged")
    for new, cached in [(4096, 0), (8192, 0), (512, 8192)]:
        yield _prefill(new // device.size(1, 256), cached // device.size(1, 256))


def _elementwise(tokens: int) -> Iterator[Case]:
    size = tokens * HIDDEN * 2

    def norms(device: Device) -> dict[str, Callable[[], object]]:
        x, residual, weight = device.randn(tokens, HIDDEN), device.randn(tokens, HIDDEN), device.randn(HIDDEN)

        def eager() -> Tensor:
            return F.rms_norm(x + residual, (HIDDEN,), weight, 1e-5)

        def transformers() -> Tensor:
            wide = (x + residual).to(torch.float32)
            scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            return weight * scaled.to(x.dtype)

        ours = {"ours": lambda: norm.add_rms_norm(x, residual, weight, 1e-5)}
        return {**ours, "eager": eager, "transformers": transformers}

    yield Case("add + RMSNorm", 4 * size, 0, norms)

    def gates(device: Device) -> dict[str, Callable[[], object]]:
        gate_up = device.randn(tokens, 2 * INTERMEDIATE)

        def eager() -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return F.silu(gate) * up

        return {"ours": lambda: activation.silu_and_mul(gate_up), "eager": eager}

    yield Case("SiLU * up", 3 * tokens * INTERMEDIATE * 2, 0, gates)

    def ropes(device: Device) -> dict[str, Callable[[], object]]:
        heads = device.randn(tokens, HEADS + 2 * KV_HEADS, DIM)
        pool = device.randn(-(-tokens // BLOCK), 1, 2, KV_HEADS, BLOCK, DIM)
        cos, sin = device.randn(tokens, DIM), device.randn(tokens, DIM)
        slots = torch.randperm(tokens, device=device.name)
        index = torch.arange(tokens, dtype=torch.int32, device=device.name)

        def eager() -> None:
            turned = heads[:, : HEADS + KV_HEADS]
            first, second = turned.chunk(2, dim=-1)
            turned.copy_(turned * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None])
            pool[slots // BLOCK, 0, :, :, slots % BLOCK] = heads[:, HEADS:].view(tokens, 2, KV_HEADS, DIM)

        return {"ours": lambda: rope.rope_and_write_kv(heads, pool, 0, slots, index, cos, sin), "eager": eager}

    yield Case("rope + KV write", 2 * tokens * (HEADS + 2 * KV_HEADS) * DIM * 2, 0, ropes)


def _product(name: str, rows: int, out_features: int, in_features: int) -> Case:
    """As a step computes it, by the choice of the table of this device if there is one, else by the stated defaults:
    O and down add the residual, gate-up applies the gate, which cuBLAS does not."""

    def make(device: Device) -> dict[str, Callable[[], object]]:
        x, weight = device.randn(rows, in_features), device.randn(out_features, in_features, scale=0.02)
        if name in ("O", "down"):
            residual, added = device.randn(rows, out_features), linear.pack_linear(weight)
            return {
                "ours": lambda: linear.linear_add(x, added, residual),
                "exact": lambda: linear.linear_add(x, added, residual, exact=True),
                "cublas": lambda: torch.addmm(residual, x, weight.t()),
            }
        gated = name == "gate-up"
        compute: Callable[..., Tensor] = linear.gated_linear if gated else linear.linear
        packed: Any = linear.pack_gated(weight) if gated else linear.pack_linear(weight)
        return {
            "ours": lambda: compute(x, packed),
            "exact": lambda: compute(x, packed, exact=True),
            "cublas": lambda: F.linear(x, weight),
        }

    num_bytes = 2.0 * (out_features * in_features + rows * (in_features + out_features))
    return Case(f"{name}, {rows} rows", num_bytes, 2.0 * rows * out_features * in_features, make)


def _samplings(rows: int, vocab: int) -> Iterator[Case]:
    for name, temperature, top_k, top_p in (
        ("greedy", 0.0, 0, 1.0),
        ("plain", 1.0, 0, 1.0),
        ("filtered", 0.8, 50, 0.9),
    ):

        def make(
            device: Device, temperature: float = temperature, top_k: int = top_k, top_p: float = top_p
        ) -> dict[str, Callable[[], object]]:
            logits = device.randn(rows, vocab, dtype=torch.float32, scale=3.0)
            index = torch.arange(rows, device=device.name)
            keys = noise.noise_keys(index, index * 0, index)

            def each(value: float, dtype: torch.dtype) -> Tensor:
                return torch.full((rows,), value, dtype=dtype, device=device.name)

            filters: tuple[Tensor | None, ...] = (None, None, None)
            if top_k:
                filters = (each(top_k, torch.int64), each(top_p, torch.float32), each(0.0, torch.float32))
            heat = each(temperature, torch.float32)
            calls: dict[str, Callable[[], object]] = {"ours": lambda: sampling.sample(logits, keys, heat, *filters)}
            if temperature == 0:
                calls["argmax"] = lambda: torch.argmax(logits, dim=-1)
            return calls

        yield Case(f"sampling, {name}, {rows} x {vocab}", 4.0 * rows * vocab, 0, make)


def _experts(tokens: int, num_experts: int, hidden: int, intermediate: int) -> Case:
    """Eight of the experts for each token, as Qwen3-30B-A3B has it."""
    chosen = min(8, num_experts // 2)

    def make(device: Device) -> dict[str, Callable[[], object]]:
        x = device.randn(tokens, hidden)
        packed = experts.pack_experts(
            device.randn(num_experts, 2 * intermediate, hidden, scale=0.02),
            device.randn(num_experts, hidden, intermediate, scale=0.02),
        )
        weights, ids = experts.route(device.randn(tokens, num_experts, dtype=torch.float32), chosen, renormalize=True)
        return {"ours": lambda: experts.experts(x, packed, weights, ids)}

    touched = min(num_experts, tokens * chosen)
    num_bytes = 2.0 * touched * 3 * hidden * intermediate + 4.0 * tokens * hidden
    return Case(f"experts, {tokens} tokens", num_bytes, 6.0 * tokens * chosen * hidden * intermediate, make)


def _pages(device: Device, contexts: list[int], layers: int = 1) -> tuple[Tensor, Tensor]:
    """A pool of some layers and block tables [rows, most] whose blocks lie scattered."""
    counts = [-(-context // BLOCK) for context in contexts]
    pool = device.randn(sum(counts), layers, 2, KV_HEADS, BLOCK, DIM)
    tables = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    for row, blocks in enumerate(torch.randperm(sum(counts)).int().split(counts)):
        tables[row, : counts[row]] = blocks
    return pool, tables.to(device.name)


def _decode(contexts: list[int], name: str = "") -> Case:
    rows, total = len(contexts), sum(contexts)

    def make(device: Device) -> dict[str, Callable[[], object]]:
        pool, tables = _pages(device, contexts)
        q = device.randn(rows, HEADS, DIM)
        slots = torch.zeros(rows, dtype=torch.int64)
        plan = attention.plan_attention(pool, [*range(rows + 1)], contexts, tables, slots, num_heads=HEADS)
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: attention.paged_attention(q, pool, 0, plan, DIM**-0.5)
        }
        if len(set(contexts)) == 1:
            keys, values = (device.randn(rows, KV_HEADS, contexts[0], DIM) for _ in range(2))
            query = q.view(rows, HEADS, 1, DIM)
            calls["sdpa_unpaged"] = lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        flashinfer = _flashinfer_decode(device, q, pool, tables, contexts)
        return {**calls, **({"flashinfer": flashinfer} if flashinfer else {})}

    label = name or f"{rows} x {contexts[0]}"
    return Case(f"paged decode, {label}", total * KV_HEADS * DIM * 4, 4.0 * total * HEADS * DIM, make)


def _layouts(rows: int, context: int) -> Case:
    """A page holds all layers of a block (a worker's pool), against a pool of one layer."""
    contexts = [context] * rows

    def make(device: Device) -> dict[str, Callable[[], object]]:
        pool, tables = _pages(device, contexts, LAYERS)
        q, slots = device.randn(rows, HEADS, DIM), torch.zeros(rows, dtype=torch.int64)

        def attend(pages: Tensor, layer_id: int) -> Callable[[], object]:
            plan = attention.plan_attention(pages, [*range(rows + 1)], contexts, tables, slots, num_heads=HEADS)
            return lambda: attention.paged_attention(q, pages, layer_id, plan, DIM**-0.5)

        return {"ours": attend(pool, 1), "per_layer": attend(pool[:, 1:2].contiguous(), 0)}

    total = rows * context
    name = f"paged decode, {rows} x {context}, pages of {LAYERS} layers"
    return Case(name, total * KV_HEADS * DIM * 4, 4.0 * total * HEADS * DIM, make)


def _flashinfer_decode(
    device: Device, q: Tensor, pool: Tensor, tables: Tensor, contexts: list[int]
) -> Callable[[], object] | None:
    """FlashInfer's decode over the same pages, where it is installed."""
    try:
        import flashinfer
    except ImportError:
        return None
    counts = [-(-context // BLOCK) for context in contexts]
    starts = torch.tensor([0, *counts]).cumsum(0).int().to(device.name)
    pages = torch.cat([tables[row, :count] for row, count in enumerate(counts)])
    last = torch.tensor([(context - 1) % BLOCK + 1 for context in contexts], dtype=torch.int32, device=device.name)
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=device.name)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(starts, pages, last, HEADS, KV_HEADS, DIM, BLOCK, q_data_type=q.dtype, kv_data_type=pool.dtype)
    return lambda: wrapper.run(q, pool[:, 0])


def _sdpa(backend: SDPBackend, query: Tensor, keys: Tensor, values: Tensor, **how: bool) -> Callable[[], object]:
    """Causal attention by one of torch's bodies, or by any on a CPU."""

    def call() -> Tensor:
        with sdpa_kernel([backend] if query.is_cuda else [SDPBackend.MATH]):
            return F.scaled_dot_product_attention(query, keys, values, is_causal=True, **how)

    return call


def _is_causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


@functools.cache
def _compiled_flex() -> Callable[..., object]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(device: Device, query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], object]:
    """FlexAttention under a causal mask, compiled; in a dry run as it is, for a compiler takes minutes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = query.shape[2]
    mask = create_block_mask(_is_causal, None, None, length, length, device=device.name)
    attend: Callable[..., object] = flex_attention if device.dry else _compiled_flex()
    return lambda: attend(query, keys, values, block_mask=mask, enable_gqa=True)


def _varlen(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], object] | None:
    """torch's own attention over sequences one behind the other, where this torch has it: here over one. GPUs only."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    length = query.shape[2]
    q, k, v = (each[0].transpose(0, 1).contiguous() for each in (query, keys, values))
    ends = torch.tensor([0, length], dtype=torch.int32, device=query.device)
    is_newer = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if is_newer else {"is_causal": True}
    return lambda: varlen_attn(q, k, v, ends, ends, length, length, **causal)


def _prefill(new: int, cached: int) -> Case:
    context = new + cached

    def make(device: Device) -> dict[str, Callable[[], object]]:
        pool, tables = _pages(device, [context])
        q = device.randn(new, HEADS, DIM)
        slots = torch.zeros(new, dtype=torch.int64)
        plan = attention.plan_attention(pool, [0, new], [context], tables, slots, num_heads=HEADS)
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: attention.paged_attention(q, pool, 0, plan, DIM**-0.5)
        }
        if not cached:
            query = q.transpose(0, 1)[None].contiguous()
            keys, values = (device.randn(1, KV_HEADS, context, DIM) for _ in range(2))
            calls["flash_unpaged"] = _sdpa(SDPBackend.FLASH_ATTENTION, query, keys, values, enable_gqa=True)
            wide = [each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (keys, values)]
            calls["cudnn_unpaged"] = _sdpa(SDPBackend.CUDNN_ATTENTION, query, *wide)
            calls["flex_unpaged"] = _flex(device, query, keys, values)
            if varlen := _varlen(query, *wide):
                calls["varlen_unpaged"] = varlen
        return calls

    pairs = new * cached + new * (new + 1) / 2
    label = f"{new} onto {cached}" if cached else f"{new}"
    return Case(
        f"paged prefill, {label}", 4.0 * (new * HEADS + context * KV_HEADS) * DIM, 4 * pairs * HEADS * DIM, make
    )
