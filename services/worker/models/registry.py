"""The families we know, one line each."""

from collections.abc import Callable
from typing import Any

from services.worker.models import llama, mistral, qwen2, qwen3
from services.worker.models.spec import Family
from shared.checkpoint import CheckpointError

FAMILIES: dict[str, Callable[[dict[str, Any]], Family]] = {
    "LlamaForCausalLM": llama.translate,
    "MistralForCausalLM": mistral.translate,
    "Qwen2ForCausalLM": qwen2.translate,
    "Qwen3ForCausalLM": qwen3.translate,
}


def translate(config: dict[str, Any]) -> Family:
    """The spec and weight names for a config.json; raises CheckpointError naming what is not implemented."""
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in FAMILIES:
        named = ", ".join(map(str, architectures)) or "no architecture"
        raise CheckpointError(f"config.json names {named}: only {', '.join(FAMILIES)} are implemented")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unnamed")
        raise CheckpointError(f"config.json: quantization_config ({method}) is not implemented")
    return FAMILIES[architectures[0]](config)
