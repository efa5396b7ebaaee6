"""Reading config.json: typed, with the family's defaults, refusing by name what is not implemented."""

import math
from collections.abc import Callable
from typing import Any, TypeGuard

from kernels.ops.activation import Activation
from services.worker.layers.positions import (
    DefaultRope,
    DynamicRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    Rope,
    Rotary,
    YarnRope,
)
from shared.checkpoint import CheckpointError

DEFAULT_THETA = 10_000.0
LARGEST_INTEGER = 2**31 - 1
SMALLEST, LARGEST = 1e-30, 1e30
"""Of numbers above 0, and of all: what float32 still multiplies and divides."""
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}
"""transformers' names; its three approximations by tanh differ in the last bits only."""


class Settings:
    """A configuration and the defaults that its family assumes for keys left out. `spellings` are the family's own
    names of some keys."""

    def __init__(
        self, config: dict[str, Any], defaults: dict[str, Any], spellings: dict[str, str] | None = None
    ) -> None:
        self._config, self._defaults, self._spellings = config, defaults, spellings or {}
        self.family = config.get("model_type") or (config.get("architectures") or ["this model"])[0]

    def get(self, key: str) -> Any:
        value = self._config.get(self._spellings.get(key, key))
        value = self._config.get(key) if value is None else value
        return self._defaults.get(key) if value is None else value

    def shape(self, *, grouped: bool = True) -> dict[str, Any]:
        """What every ModelSpec states, by its fields. Not `grouped`: the family has a KV head for each query head,
        whatever the configuration says of them."""
        return {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": self.integer("hidden_size"),
            "num_layers": self.integer("num_hidden_layers"),
            "num_heads": self.integer("num_attention_heads"),
            "num_kv_heads": self.num_kv_heads() if grouped else self.integer("num_attention_heads"),
            "head_dim": self.head_dim(),
            **self.lengths(),
            "tied_embeddings": self.flag("tie_word_embeddings"),
        }

    def lengths(self) -> dict[str, int]:
        """The longest contexts, unasked and stretched: `max_position_embeddings`, times the factor of a rope that
        stretches what was trained (vLLM counts so too). A llama3 rope states its stretched length; so does a longrope,
        which is only served with it where that is asked for."""
        stated = self.integer("max_position_embeddings")
        parameters = self._stated_rope()
        if any(isinstance(value, dict) for value in parameters.values()):
            return {"max_positions": stated}  # a rope for each kind of layer: all of them reach the stated length
        kind, factor = parameters.get("rope_type", parameters.get("type")), parameters.get("factor")
        trained = _whole(parameters.get("original_max_position_embeddings"))
        trained = _whole(self.get("original_max_position_embeddings")) if trained is None else trained
        if kind == "longrope" and trained is not None and 0 < trained < stated:
            return {"max_positions": trained, "stretched_positions": stated}
        if kind not in ("linear", "dynamic", "yarn") or not _is_number(factor, SMALLEST):
            return {"max_positions": stated}  # `rotary` refuses the factor that is no number
        begin = trained if kind == "yarn" and trained is not None else stated
        if begin * factor > LARGEST_INTEGER:
            raise CheckpointError(
                f"config.json: rope factor = {factor!r}: stretches {begin} positions to more than {LARGEST_INTEGER} "
                f"({self.family})"
            )
        return {"max_positions": max(stated, int(begin * factor))}

    def integer(self, key: str, *, at_least: int = 1) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= LARGEST_INTEGER:
            raise self.refusal(key, f"must be a whole number of at least {at_least}, at most {LARGEST_INTEGER}")
        return value

    def number(self, key: str, *, at_least: float = -LARGEST) -> float:
        value = self.get(key)
        if not _is_number(value, at_least):
            raise self.refusal(key, _must_be_number(at_least))
        return float(value)

    def positive(self, key: str) -> float:
        """A number above 0."""
        return self.number(key, at_least=SMALLEST)

    def optional(self, key: str) -> float:
        """A number above 0, or 0 where there is none (null); an explicit 0 is refused."""
        return 0.0 if self.get(key) is None else self.positive(key)

    def epsilon(self, key: str) -> float:
        """Of a norm: a number that is not negative."""
        return self.number(key, at_least=0)

    def object(self, key: str) -> dict[str, Any]:
        """An object, or an empty one where there is none."""
        value = self.get(key)
        if not isinstance(value, dict | None):
            raise self.refusal(key, "must be an object")
        return value or {}

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool | None):
            raise self.refusal(key, "must be true or false")
        return bool(value)

    def refusal(self, key: str, reason: str) -> CheckpointError:
        spelled = self._spellings.get(key, key)
        name = key if self._config.get(spelled) is None else spelled
        return CheckpointError(f"config.json: {name} = {self.get(key)!r}: {reason} ({self.family})")

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse any other value of a setting whose alternatives are not implemented."""
        if self.get(key) not in allowed:
            raise self.refusal(key, f"is not implemented, only {' or '.join(map(repr, allowed))} is")

    def head_dim(self) -> int:
        hidden_size, num_heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        if self.get("head_dim") is None and hidden_size % num_heads:
            raise self.refusal("num_attention_heads", f"does not divide hidden_size = {hidden_size}")
        return hidden_size // num_heads if self.get("head_dim") is None else self.integer("head_dim")

    def activation(self, key: str) -> Activation:
        """One of kernels.ops.activation by the name that transformers gives it."""
        name = self.get(key)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise self.refusal(key, f"is not implemented, only {', '.join(ACTIVATIONS)} are")
        return ACTIVATIONS[name]

    def num_kv_heads(self) -> int:
        num_heads = self.integer("num_attention_heads")
        if self.get("num_key_value_heads") is None:
            return num_heads
        num_kv_heads = self.integer("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise self.refusal("num_key_value_heads", f"does not divide num_attention_heads = {num_heads}")
        return num_kv_heads

    def experts(self, count: str) -> dict[str, Any]:
        """How many experts, by the key `count`, and how many of them a token uses."""
        num_experts, top_k = self.integer(count), self.integer("num_experts_per_tok")
        if top_k > num_experts:
            raise self.refusal("num_experts_per_tok", f"is more than {count} = {num_experts}")
        return {"count": num_experts, "top_k": top_k}

    def rotary(self, *, partial: float | None = None, interleaved: bool = False) -> Rotary:
        """One rope for all layers, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.
        `partial`: the share of a head that is turned where nothing is said; None refuses to turn less than all."""
        parameters = self._rope_parameters()
        dim = self._rotary_dim(parameters, partial)
        return Rotary((_Rotary(self, parameters, dim).choice(),) * self.integer("num_hidden_layers"), dim, interleaved)

    def rotary_by_type(self, types: tuple[str, ...], parameters: dict[str, dict[str, Any]]) -> Rotary:
        """A rope for each kind of layer, `types` being that of each layer."""
        dim = self._rotary_dim({}, None)
        ropes = {kind: _Rotary(self, stated, dim).choice() for kind, stated in parameters.items()}
        return Rotary(tuple(ropes[kind] for kind in types), dim)

    def layer_types(self, every: int | None) -> tuple[str, ...]:
        """full_attention or sliding_attention for each layer: as stated, or full in each `every`-th one."""
        num_layers, types = self.integer("num_hidden_layers"), self.get("layer_types")
        if types is None and every is not None:
            types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(num_layers)]
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != num_layers or not all(kind in known for kind in types):
            raise self.refusal("layer_types", f"must be {num_layers} times full_attention or sliding_attention")
        return tuple(types)

    def windows_of(self, types: tuple[str, ...]) -> tuple[int | None, ...]:
        """`sliding_window` where a layer slides."""
        sliding = self.integer("sliding_window") if "sliding_attention" in types else None
        return tuple(sliding if kind == "sliding_attention" else None for kind in types)

    def one_window(self) -> tuple[int | None, ...]:
        """`sliding_window` for every layer, or none."""
        window = None if self.get("sliding_window") is None else self.integer("sliding_window")
        return (window,) * self.integer("num_hidden_layers")

    def no_windows(self) -> tuple[None, ...]:
        return (None,) * self.integer("num_hidden_layers")

    def layer_windows(self) -> tuple[int | None, ...]:
        """Per-layer windows of the Qwen families: `layer_types`, else the layers from `max_window_layers` on."""
        num_layers = self.integer("num_hidden_layers")
        window = (
            self.integer("sliding_window") if self.flag("use_sliding_window") and self.get("sliding_window") else None
        )
        if self.get("layer_types") is None:
            first = self.integer("max_window_layers", at_least=0)
            return tuple(window if layer_id >= first else None for layer_id in range(num_layers))
        return tuple(window if kind == "sliding_attention" else None for kind in self.layer_types(None))

    def _stated_rope(self) -> dict[str, Any]:
        # transformers lets rope_scaling win where both are given
        return self.object("rope_scaling") or self.object("rope_parameters")

    def _rotary_dim(self, parameters: dict[str, Any], partial: float | None) -> int:
        head_dim, share = self.head_dim(), parameters.get("partial_rotary_factor", self.get("partial_rotary_factor"))
        if partial is None and share not in (None, 1, 1.0):
            raise CheckpointError(f"config.json: partial_rotary_factor = {share!r} is not implemented ({self.family})")
        if share is None:
            share = 1.0 if partial is None else partial
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise CheckpointError(f"config.json: partial_rotary_factor = {share!r} must be above 0, at most 1")
        dim = int(head_dim * share)
        if dim % 2 or dim == 0:
            raise self.refusal("head_dim", f"must be even for rotary positions, as must the {dim} elements turned")
        return dim

    def _rope_parameters(self) -> dict[str, Any]:
        stated = self._stated_rope()
        if any(isinstance(value, dict) for value in stated.values()):
            raise self.refusal("rope_parameters", "is not implemented per layer type, only for the whole model")
        parameters = {key: value for key, value in stated.items() if value is not None}
        theta = self.get("rope_theta")
        parameters.setdefault("rope_theta", DEFAULT_THETA if theta is None else theta)
        if self.get("original_max_position_embeddings") is not None:
            parameters["original_max_position_embeddings"] = self.get("original_max_position_embeddings")
        return parameters


class _Rotary:
    """Translates one set of rope parameters."""

    def __init__(self, settings: Settings, parameters: dict[str, Any], dim: int) -> None:
        self._settings, self._dim = settings, dim
        self._parameters = {key: value for key, value in parameters.items() if value is not None}
        self._theta = self._positive("rope_theta")

    def choice(self) -> Rope:
        kind = self._parameters.get("rope_type", self._parameters.get("type", "default"))
        makers: dict[str, Callable[[], Rope]] = {
            "default": lambda: DefaultRope(self._theta),
            "linear": lambda: LinearRope(self._theta, self._positive("factor")),
            "dynamic": self._dynamic,
            "yarn": self._yarn,
            "longrope": self._longrope,
            "llama3": self._llama3,
        }
        if not isinstance(kind, str) or kind not in makers:
            raise CheckpointError(
                f"config.json: rope_type = {kind!r} is not implemented, only {', '.join(makers)} "
                f"({self._settings.family})"
            )
        return makers[kind]()

    def _dynamic(self) -> Rope:
        if self._dim < 4:
            raise self._refusal("rope_type", f"needs 4 elements of a head to turn, and there are {self._dim}")
        return DynamicRope(self._theta, self._positive("factor"), self._settings.integer("max_position_embeddings"))

    def _yarn(self) -> Rope:
        factor, truncate = self._factor(), self._parameters.get("truncate", True)
        if self._theta <= 1:
            raise self._refusal("rope_theta", "must be above 1 for yarn")
        if not isinstance(truncate, bool):
            raise self._refusal("truncate", "must be true or false")
        return YarnRope(
            theta=self._theta,
            factor=factor,
            trained_positions=self._trained(),
            attention_factor=self._yarn_attention_factor(factor),
            beta_fast=self._beta("beta_fast", 32.0),
            beta_slow=self._beta("beta_slow", 1.0),
            truncate=truncate,
        )

    def _beta(self, key: str, default: float) -> float:
        """An explicit 0 is the default, as in transformers."""
        return self._positive(key) if self._parameters.get(key) else default

    def _yarn_attention_factor(self, factor: float) -> float:
        def mscale(weight: float = 1.0) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        if "attention_factor" in self._parameters:
            return self._positive("attention_factor")
        weight, weight_all = self._number("mscale", 0.0, at_least=0), self._number("mscale_all_dim", 0.0, at_least=0)
        return mscale(weight) / mscale(weight_all) if weight and weight_all else mscale()

    def _longrope(self) -> Rope:
        factor, trained = self._factor(), self._trained()
        default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
        return LongRope(
            theta=self._theta,
            short_factor=self._numbers("short_factor"),
            long_factor=self._numbers("long_factor"),
            trained_positions=trained,
            attention_factor=self._positive("attention_factor", default),
        )

    def _llama3(self) -> Rope:
        low, high = self._positive("low_freq_factor"), self._positive("high_freq_factor")
        if high <= low:
            raise self._refusal("high_freq_factor", f"must be greater than low_freq_factor = {low}")
        return Llama3Rope(self._theta, self._positive("factor"), low, high, self._trained())

    def _factor(self) -> float:
        """Stated, or the ratio of the context now to the context in training."""
        return self._positive("factor", self._settings.integer("max_position_embeddings") / self._trained())

    def _trained(self) -> int:
        key, default = "original_max_position_embeddings", self._settings.integer("max_position_embeddings")
        trained = _whole(self._parameters.get(key, default))
        if trained is None or not 2 <= trained <= LARGEST_INTEGER:
            raise self._refusal(key, f"must be a whole number of at least 2; left out, it is {default}")
        return trained

    def _positive(self, key: str, default: float | None = None) -> float:
        return self._number(key, default, at_least=SMALLEST)

    def _number(self, key: str, default: float | None = None, *, at_least: float = -LARGEST) -> float:
        value = self._parameters.get(key, default)
        if not _is_number(value, at_least):
            raise self._refusal(key, _must_be_number(at_least))
        return float(value)

    def _numbers(self, key: str) -> tuple[float, ...]:
        values, size = self._parameters.get(key), self._dim // 2
        if (
            not isinstance(values, list)
            or len(values) != size
            or not all(_is_number(each, SMALLEST) for each in values)
        ):
            raise self._refusal(key, f"must be a list of {size} numbers above 0")
        return tuple(float(value) for value in values)

    def _refusal(self, key: str, reason: str) -> CheckpointError:
        value = self._parameters.get(key)
        return CheckpointError(f"config.json: rope {key} = {value!r}: {reason} ({self._settings.family})")


def _is_number(value: Any, at_least: float) -> TypeGuard[int | float]:
    """Neither NaN nor infinite nor an integer beyond LARGEST, which no float may hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and at_least <= value <= LARGEST


def _must_be_number(at_least: float) -> str:
    kind = {-LARGEST: "a number", SMALLEST: "a number above 0"}.get(at_least, f"a number of at least {at_least:g}")
    return f"must be {kind}, at most {LARGEST:g}"


def _whole(value: Any) -> int | None:
    """4096 of 4096 or 4096.0, else None."""
    return int(value) if _is_number(value, -LARGEST) and value == int(value) else None
