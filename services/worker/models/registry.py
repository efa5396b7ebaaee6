"""The families we know, one line each; MPT has two, as its own code and transformers spell it differently."""

from collections.abc import Callable
from typing import Any

from services.worker.models import (
    bloom,
    cohere,
    cohere2,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    llama,
    mistral,
    mixtral,
    mpt,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    starcoder2,
    xglm,
)
from services.worker.models.spec import Family
from shared.checkpoint import CheckpointError

FAMILIES: dict[str, Callable[[dict[str, Any]], Family]] = {
    "BloomForCausalLM": bloom.translate,
    "Cohere2ForCausalLM": cohere2.translate,
    "CohereForCausalLM": cohere.translate,
    "FalconForCausalLM": falcon.translate,
    "GPT2LMHeadModel": gpt2.translate,
    "GPTBigCodeForCausalLM": gpt_bigcode.translate,
    "GPTJForCausalLM": gptj.translate,
    "GPTNeoXForCausalLM": gpt_neox.translate,
    "Gemma2ForCausalLM": gemma2.translate,
    "Gemma3ForCausalLM": gemma3.translate,
    "GemmaForCausalLM": gemma.translate,
    "GptOssForCausalLM": gpt_oss.translate,
    "LlamaForCausalLM": llama.translate,
    "MistralForCausalLM": mistral.translate,
    "MixtralForCausalLM": mixtral.translate,
    "MPTForCausalLM": mpt.translate,
    "MptForCausalLM": mpt.translate,
    "OPTForCausalLM": opt.translate,
    "OlmoeForCausalLM": olmoe.translate,
    "Phi3ForCausalLM": phi3.translate,
    "PhiForCausalLM": phi.translate,
    "Qwen2ForCausalLM": qwen2.translate,
    "Qwen2MoeForCausalLM": qwen2_moe.translate,
    "Qwen3ForCausalLM": qwen3.translate,
    "Qwen3MoeForCausalLM": qwen3_moe.translate,
    "Starcoder2ForCausalLM": starcoder2.translate,
    "XGLMForCausalLM": xglm.translate,
}


def translate(config: dict[str, Any]) -> Family:
    """The spec and weight names for a config.json; raises CheckpointError naming what is not implemented."""
    architectures, quantization = config.get("architectures") or [], config.get("quantization_config")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"config.json: architectures = {architectures!r}: must be a list of one name")
    if len(architectures) != 1 or architectures[0] not in FAMILIES:
        named = ", ".join(architectures) or "no architecture"
        raise CheckpointError(f"config.json names {named}: only {', '.join(FAMILIES)} are implemented")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise CheckpointError(f"config.json: quantization_config ({method}) is not implemented")
    return FAMILIES[architectures[0]](config)
