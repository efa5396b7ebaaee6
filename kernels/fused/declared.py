"""The compiled forms that a model needs: its host functions called with meta tensors of its shapes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.fused import activation, attention, blocks, experts, linear, norm, rope, sampling
from kernels.fused.launch import Form, recorded
from kernels.fused.linear import PackedGate, PackedLinear
from kernels.tuning import candidates
from kernels.tuning.candidates import BUCKETS, Weight


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model fixes. Sizes in elements; `rotary_dim` None is the whole head, 0 no rope. Of a mixture of experts
    `intermediate` is that of its shared expert, 0 where it has none. `qk_norm_form` is a services.worker QkNorm."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    qk_norm: bool = False
    block_size: int = 16
    max_model_len: int = 8192
    dtype: torch.dtype = torch.bfloat16
    windows: tuple[int, ...] = ()
    soft_cap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    num_layers: int = 32
    layer_norm: bool = False
    biased_norm: bool = False
    norm_plus_one: bool = False
    rotary_dim: int | None = None
    interleaved_rope: bool = False
    activation: str = "silu"
    gated: bool = True
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0
    expert_clamp: float = 0.0
    biased_experts: bool = False
    renormalized_experts: bool = True
    qk_norm_form: str = "heads"
    unturned_layers: bool = False

    @property
    def exactness(self) -> tuple[bool, ...]:
        """How a worker's steps may be: those of float32 are all exact."""
        return (True,) if self.dtype == torch.float32 else (False, True)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")


SHAPES = (
    ModelShape("Llama-3.1-8B", 4096, 32, 8, 128, 14336, 128_256),
    ModelShape("Qwen3-8B", 4096, 32, 8, 128, 12288, 151_936, qk_norm=True, num_layers=36),
    ModelShape("Qwen3-0.6B", 1024, 16, 8, 128, 3072, 151_936, qk_norm=True, num_layers=28),
    ModelShape(
        "Gemma-2-9B", 3584, 16, 8, 256, 14336, 256_000, windows=(4096,), soft_cap=50.0,
        num_layers=42, norm_plus_one=True, activation="gelu_tanh",
    ),
    ModelShape(
        "gpt-oss-20b", 2880, 64, 8, 64, 0, 201_088, windows=(128,), sinks=True, num_layers=24,
        num_experts=32, experts_per_token=4, expert_width=2880, expert_clamp=7.0, biased_experts=True,
    ),
    ModelShape(
        "MPT-7B", 4096, 32, 32, 128, 16384, 50_432, alibi=True,
        layer_norm=True, rotary_dim=0, activation="gelu", gated=False,
    ),
    ModelShape(
        "GPT-J-6B", 4096, 16, 16, 256, 16384, 50_400, num_layers=28,
        layer_norm=True, biased_norm=True, rotary_dim=64, interleaved_rope=True, activation="gelu_tanh", gated=False,
    ),
    ModelShape(
        "Phi-2", 2560, 32, 32, 80, 10240, 51_200,
        layer_norm=True, biased_norm=True, rotary_dim=32, activation="gelu_tanh", gated=False,
    ),
    ModelShape(
        "Qwen3-30B-A3B", 2048, 32, 4, 128, 0, 151_936, qk_norm=True, num_layers=48,
        num_experts=128, experts_per_token=8, expert_width=768,
    ),
    ModelShape(
        "Falcon-7B", 4544, 71, 1, 64, 18_176, 65_024,
        layer_norm=True, biased_norm=True, activation="gelu", gated=False,
    ),
    ModelShape(
        "Mixtral-8x7B", 4096, 32, 8, 128, 0, 32_000, num_experts=8, experts_per_token=2, expert_width=14336,
    ),
    ModelShape("Llama-2-7B-float16", 4096, 32, 32, 128, 11008, 32_000, dtype=torch.float16),
    ModelShape(
        "Gemma-2-2B-float32", 2304, 8, 4, 256, 9216, 256_000, windows=(4096,), soft_cap=50.0,
        num_layers=26, norm_plus_one=True, activation="gelu_tanh", dtype=torch.float32,
    ),
    ModelShape(
        "OLMoE-1B-7B-float32", 2048, 16, 16, 128, 0, 50_304, num_layers=16, dtype=torch.float32, qk_norm=True,
        qk_norm_form="projection", num_experts=64, experts_per_token=8, expert_width=1024, renormalized_experts=False,
    ),
)  # fmt: skip
"""What prove.py compiles."""


def forms_of(shape: ModelShape) -> list[Form]:
    """Every form that a step of this model may ask for, at any number of rows."""
    with recorded() as forms:
        for declare in DECLARATIONS:
            declare(shape)
    return forms


def forms_with(shape: ModelShape, weights: Iterable[tuple[str, PackedLinear | PackedGate]]) -> list[Form]:
    """The same of a loaded model: `weights` are its own, each with the operation of kernels.ops.linear that uses it, so
    that its products are those that its tables choose."""
    with recorded() as forms:
        for declare in DECLARATIONS:
            if declare is not _linears:
                declare(shape)
        for op, packed in weights:
            _packed_products(shape, op, packed)
    return forms


def _norms(shape: ModelShape) -> None:
    x, weight = shape.empty(2, shape.hidden), shape.empty(shape.hidden)
    if shape.layer_norm:
        bias = weight if shape.biased_norm else None
        norm.layer_norm(x, weight, bias, 1e-5)
        norm.add_layer_norm(x, x, weight, bias, 1e-5)
    else:
        norm.rms_norm(x, weight, 1e-5, plus_one=shape.norm_plus_one)
        norm.add_rms_norm(x, x, weight, 1e-5, plus_one=shape.norm_plus_one)
    if shape.qk_norm and shape.qk_norm_form != "heads":
        _head_norms(shape)


def _head_norms(shape: ModelShape) -> None:
    """Those that are no part of the rope's launch; of views into the merged projection."""
    heads, first_key = shape.empty(2, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim), shape.num_heads
    for part in (heads[:, :first_key], heads[:, first_key : first_key + shape.num_kv_heads]):
        if shape.qk_norm_form == "projection":
            for rows in (part, part[:1]):  # torch forgets the stride of a lone row
                norm.rms_norm(rows.flatten(1), shape.empty(part[0].numel()), 1e-5)
        else:
            norm.layer_norm(shape.empty(*part.shape, dtype=torch.float32), None, None, 1e-5)


def _ropes(shape: ModelShape) -> None:
    pool = shape.empty(4, shape.num_layers, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
    heads = shape.empty(4, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    in_launch = shape.qk_norm and shape.qk_norm_form == "heads"
    slots, weight = shape.empty(4, dtype=torch.int64), shape.empty(shape.head_dim) if in_launch else None
    rows = shape.empty(4, dtype=torch.int32)  # a decoder gathers the tables' rows before
    rotary_dim = shape.head_dim if shape.rotary_dim is None else shape.rotary_dim
    for dim in dict.fromkeys((rotary_dim, 0 if shape.unturned_layers else rotary_dim)):
        table = shape.empty(shape.max_model_len, dim) if dim else None
        rope.rope_and_write_kv(
            heads,
            pool,
            0,
            slots,
            rows if dim else None,
            table,
            table,
            interleaved=shape.interleaved_rope,
            q_norm=weight,
            k_norm=weight,
            eps=1e-6,
            plus_one=shape.norm_plus_one and weight is not None,
        )


def _activations(shape: ModelShape) -> None:
    if not shape.intermediate:
        return
    if shape.gated:
        activation.activate_and_mul(shape.empty(2, 2 * shape.intermediate), shape.activation)
    else:
        activation.activate(shape.empty(2, shape.intermediate), shape.activation)


def _linears(shape: ModelShape) -> None:
    """By the choices without a table; a worker asks for those of its own."""
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    weights = [
        Weight("linear", heads, shape.hidden),
        Weight("linear_add", shape.hidden, shape.num_heads * shape.head_dim),
        Weight("linear", shape.vocab_size, shape.hidden),
    ]
    if shape.intermediate:
        gated_here = shape.gated and shape.activation == "silu"  # other gates follow in a launch of their own
        width = shape.intermediate * (2 if shape.gated and not gated_here else 1)
        weights.append(Weight("gated_linear" if gated_here else "linear", width, shape.hidden))
        weights.append(Weight("linear_add", shape.hidden, shape.intermediate))
    for weight in weights:
        _products(shape, weight)


def _products(shape: ModelShape, weight: Weight) -> None:
    values = shape.empty(weight.halves * weight.out_features, weight.in_features)
    _packed_products(
        shape, weight.op, (linear.pack_gated if weight.op == "gated_linear" else linear.pack_linear)(values)
    )


def _packed_products(shape: ModelShape, op: str, packed: PackedLinear | PackedGate) -> None:
    """One weight at every number of rows that has a form of its own; its values are not looked at."""
    bias = None if packed.bias is None else packed.bias.to("meta")
    packed = replace(packed, weight=packed.weight.to("meta"), bias=bias)
    plan = packed.plan if isinstance(packed, PackedGate) else packed.added if op == "linear_add" else packed.plain
    for exact in shape.exactness:
        for num_rows in (*BUCKETS, *linear.exact_row_counts(plan)) if exact else BUCKETS:
            x = shape.empty(num_rows, packed.weight.shape[1])
            residual = (shape.empty(num_rows, packed.out_features),) if op == "linear_add" else ()
            getattr(linear, op)(x, packed, *residual, exact=exact)


def candidate_forms(shared_bytes: int) -> list[Form]:
    """What the tuner may choose, at shapes of Llama-3.1-8B: every tile, with its K in the fewest and most parts."""
    shapes = (("linear_add", 4096, 4096), ("gated_linear", 14336, 4096), ("linear", 128_256, 4096))
    meta = torch.device("meta")
    with recorded() as forms:
        for weight in (Weight(*shape) for shape in shapes):
            x, residual = SHAPES[0].empty(2, weight.in_features), None
            values = SHAPES[0].empty(weight.halves * weight.out_features, weight.in_features)
            if weight.op == "linear_add":
                residual = SHAPES[0].empty(2, weight.out_features)
            for config in candidates.extremes(weight, shared_bytes):
                linear.prepare(weight, config, 2, meta)(x, values, residual)
    return forms


def _blocks(shape: ModelShape) -> None:
    pool = shape.empty(4, shape.num_layers, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
    ids = shape.empty(2, dtype=torch.int64)
    blocks.copy_blocks(pool, ids, ids)
    blocks.scatter_blocks(blocks.gather_blocks(pool, ids), pool, ids)


def _attentions(shape: ModelShape) -> None:
    pool = shape.empty(4, shape.num_layers, 2, shape.num_kv_heads, shape.block_size, shape.head_dim)
    heads = shape.empty(4, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    per_head = shape.empty(shape.num_heads, dtype=torch.float32)
    tables, slots = shape.empty(2, 8, dtype=torch.int32), shape.empty(4, dtype=torch.int64)
    starts, contexts = [0, 3, 4], [3, 2 * attention.MOST_SPLIT]  # a chunk, and a row of two splits
    for window in (None, *shape.windows):
        for exact in shape.exactness:
            plan = attention.plan_attention(
                pool, starts, contexts, tables, slots, num_heads=shape.num_heads, window=window, exact=exact
            )
            tiles = (plan.tile, attention.LARGE_PROMPT) if plan.tile is attention.PROMPT else (plan.tile,)
            for tile in tiles:
                attention.paged_attention(
                    heads[:, : shape.num_heads],
                    pool,
                    min(1, shape.num_layers - 1),
                    replace(plan, tile=tile),
                    shape.head_dim**-0.5,
                    soft_cap=shape.soft_cap,
                    alibi_slopes=per_head if shape.alibi else None,
                    sinks=per_head if shape.sinks else None,
                )


def _sampling(shape: ModelShape) -> None:
    """float32 logits, as a decoder returns them."""
    logits = shape.empty(2, shape.vocab_size, dtype=torch.float32)
    ids, floats = shape.empty(2, dtype=torch.int64), shape.empty(2, dtype=torch.float32)
    sampling.best(logits)
    keys = sampling.noise_keys(ids, ids, ids)
    sampling.sample(logits, keys, floats, ids, floats, floats)
    sampling.sample(logits, keys, floats, None, None, None)
    sampling.token_logprobs(logits, ids, 5)
    sampling.add_bias(logits, ids, ids, floats)
    sampling.penalize(logits, ids, ids, floats, floats, floats, floats)
    sampling.forbid(logits, ids, ids)
    sampling.restrict(logits, ids, shape.empty(2, -(-shape.vocab_size // 32), dtype=torch.int32))


def _experts(shape: ModelShape) -> None:
    if not shape.num_experts:
        return
    count, width, biased = shape.num_experts, shape.expert_width, shape.biased_experts
    packed = experts.pack_experts(
        shape.empty(count, 2 * width, shape.hidden),
        shape.empty(count, shape.hidden, width),
        gate_up_bias=shape.empty(count, 2 * width) if biased else None,
        down_bias=shape.empty(count, shape.hidden) if biased else None,
        clamp=shape.expert_clamp,
    )
    behind = 1 if shape.intermediate else 0  # the logit of a shared expert's gate
    for num_tokens in (2, 1024 * shape.num_experts):  # with the exact one, each of the tiles that it may take
        logits, x = shape.empty(num_tokens, count + behind)[:, :count], shape.empty(num_tokens, shape.hidden)
        weights, expert_ids = experts.route(logits, shape.experts_per_token, renormalize=shape.renormalized_experts)
        for exact in shape.exactness:
            experts.experts(x, packed, weights, expert_ids, exact=exact)


DECLARATIONS: tuple[Callable[[ModelShape], None], ...] = (
    _norms,
    _ropes,
    _activations,
    _linears,
    _blocks,
    _attentions,
    _sampling,
    _experts,
)
