"""From a spec and a source of weights to layers."""

import torch
from torch import Tensor

from kernels.ops.experts import pack_experts
from services.worker.layers.attention import Attention, Scoring
from services.worker.layers.blocks import Layer, ParallelLayer, PostNormLayer, PreNormLayer, SandwichLayer
from services.worker.layers.linear import ActivatedLinear, GatedLinear, Linear
from services.worker.layers.mlp import ExpertsMlp, FeedForward, Mlp
from services.worker.layers.norm import HeadsLayerNorm, LayerNorm, Norm, ProjectionRmsNorm, RmsNorm
from services.worker.layers.positions import Alibi, Rotary
from services.worker.models.spec import Experts, Family, Gated, Plain, RmsNormSpec
from services.worker.models.weights import WeightSource, layer_matrices, names_in
from shared.cache_groups import group_layers


class LayerBuilder:
    """Builds a family's layers from a source of weights, on a device."""

    def __init__(self, family: Family, weights: WeightSource, device: str, by_rows: bool) -> None:
        self._spec, self._weights, self._device, self._by_rows = family.spec, weights, device, by_rows
        self.names = names_in(family, weights.has)
        self._matrices = layer_matrices(self._spec, self.names.layer_names)
        self._places = group_layers(self._spec.windows).places

    def take(self, name: str) -> Tensor:
        """One tensor by its whole name."""
        return self._weights.take(name).to(self._device)

    def norm(self, name: str) -> Norm:
        """A norm of hidden states, of the kind that the model has."""
        kind, weight = self._spec.norm, self.take(f"{name}.weight")
        if isinstance(kind, RmsNormSpec):
            return RmsNorm(weight, kind.eps, plus_one=kind.plus_one)
        return LayerNorm(weight, self.take(f"{name}.bias") if kind.biased else None, kind.eps)

    def plain(self, name: str) -> Linear:
        """A projection without bias."""
        return Linear(self.take(f"{name}.weight"), by_rows=self._by_rows)

    def layer(self, layer_id: int) -> Layer:
        names, prefix = self.names.layer_names, self.names.base + self.names.layer.format(layer_id)

        def norm(name: str) -> Norm:
            return self.norm(prefix + name)

        attention, mlp = self._attention(layer_id, prefix), self._feed_forward(prefix)
        match self._spec.block:
            case "pre_norm":
                return PreNormLayer(norm(names.attention_norm), attention, norm(names.mlp_norm), mlp)
            case "post_norm":
                return PostNormLayer(attention, norm(names.attention_norm), mlp, norm(names.mlp_norm))
            case "sandwich":
                around_attention = norm(names.attention_norm), attention, norm(names.attention_post_norm)
                return SandwichLayer(*around_attention, norm(names.mlp_norm), mlp, norm(names.mlp_post_norm))
            case "parallel":
                return ParallelLayer(norm(names.attention_norm), attention, None, mlp)
            case "parallel_two_norms":
                return ParallelLayer(norm(names.attention_norm), attention, norm(names.mlp_norm), mlp)

    def _attention(self, layer_id: int, prefix: str) -> Attention:
        spec, names = self._spec, self.names.layer_names
        positions = spec.positions
        slopes = torch.tensor(positions.slopes, device=self._device) if isinstance(positions, Alibi) else None
        scoring = Scoring(
            scale=spec.scale,
            rope=positions.ropes[layer_id] if isinstance(positions, Rotary) else None,
            interleaved=isinstance(positions, Rotary) and positions.interleaved,
            soft_cap=spec.attention_soft_cap,
            alibi_slopes=slopes,
            sinks=self.take(prefix + names.sinks).float() if spec.sinks else None,
        )
        return Attention(
            self._places[layer_id],
            spec.heads,
            self._linear("qkv", prefix),
            self._linear("out", prefix),
            scoring,
            q_norm=self._qk_norm(prefix + names.query_norm),
            k_norm=self._qk_norm(prefix + names.key_norm),
            qkv_clip=spec.qkv_clip,
        )

    def _qk_norm(self, name: str) -> Norm | None:
        spec = self._spec
        if spec.qk_norm is None:
            return None
        weight, eps = self.take(f"{name}.weight"), spec.norm.eps
        if spec.qk_norm == "heads":
            return RmsNorm(weight, eps, plus_one=isinstance(spec.norm, RmsNormSpec) and spec.norm.plus_one)
        return HeadsLayerNorm(weight, eps) if spec.qk_norm == "heads_centred" else ProjectionRmsNorm(weight, eps)

    def _feed_forward(self, prefix: str) -> FeedForward:
        kind = self._spec.feed_forward
        if isinstance(kind, Experts):
            return self._experts(kind, prefix)
        weight, bias = self._read("up", prefix)
        up: GatedLinear | ActivatedLinear
        if isinstance(kind, Gated) and kind.activation == "silu":
            up = GatedLinear(weight, bias, by_rows=self._by_rows)
        else:
            gated = not isinstance(kind, Plain)
            up = ActivatedLinear(weight, bias, activation=kind.activation, gated=gated, by_rows=self._by_rows)
        return Mlp(up, self._linear("down", prefix))

    def _experts(self, kind: Experts, prefix: str) -> ExpertsMlp:
        router, router_bias = self._read("router", prefix)
        shared = None
        if kind.shared_width:
            router = torch.cat((router, self._read("shared_gate", prefix)[0]))
            up = GatedLinear(*self._read("shared_up", prefix), by_rows=self._by_rows)
            shared = Mlp(up, self._linear("shared_down", prefix))
        gate_up, gate_up_bias = self._read("up", prefix)
        down, down_bias = self._read("down", prefix)
        packed = pack_experts(gate_up, down, gate_up_bias=gate_up_bias, down_bias=down_bias, clamp=kind.clamp)
        linear = Linear(router, router_bias, by_rows=self._by_rows)
        return ExpertsMlp(linear, packed, kind.top_k, renormalize=kind.renormalize, shared=shared)

    def _linear(self, name: str, prefix: str) -> Linear:
        return Linear(*self._read(name, prefix), by_rows=self._by_rows)

    def _read(self, name: str, prefix: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._matrices[name].read(self._weights, prefix)
        return weight.to(self._device), None if bias is None else bias.to(self._device)
