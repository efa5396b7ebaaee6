"""A checkpoint that we cannot serve faithfully is refused by name: the file, the tensor or the setting."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from services.worker.layers.positions import Rotary, Sinusoidal, attention_factor, inverse_frequencies, sinusoids
from services.worker.models.decoder import load_decoder
from services.worker.models.registry import translate
from services.worker.models.size import sizes_of
from shared.checkpoint import CheckpointError, open_checkpoint
from tests.models.twins import BASE, TWINS, make_twin

LLAMA = BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.fixture
def folder(twin_folder, tmp_path):
    """A copy of a twin, free to be damaged."""
    return shutil.copytree(make_twin("llama", twin_folder), tmp_path / "twin")


def load(folder, dtype=torch.float32):
    return load_decoder(open_checkpoint(folder), dtype)


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder, *parts, dtype=torch.float32):
    with pytest.raises(CheckpointError) as caught:
        load(folder, dtype)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_a_missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, str(folder), "model.layers.1.mlp.up_proj.weight", "lack")


def test_a_missing_head_of_an_untied_model(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, "lm_head.weight")


def test_a_leftover_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    refused(folder, "model.safetensors", "model.layers.0.self_attn.q_proj.bias", "left over")


def test_many_leftover_tensors_are_counted(folder):
    edit_config(folder, num_hidden_layers=1)
    refused(folder, "and 14 more")


def test_a_wrong_shape(folder):
    edit_config(folder, intermediate_size=171)
    refused(folder, "model.safetensors", "model.layers.0.mlp.gate_proj.weight", "[172, 64]", "[171, 64]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite(folder, value):
    edit_tensors(folder, lambda tensors: tensors["model.layers.2.self_attn.o_proj.weight"][3, 5].fill_(value))
    refused(folder, "model.safetensors", "model.layers.2.self_attn.o_proj.weight", "NaN")


def test_a_value_too_large_for_the_dtype_it_is_loaded_in(folder):
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    refused(folder, "model.norm.weight", "float16", dtype=torch.float16)


def test_integers_where_weights_should_be(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    refused(folder, "model.norm.weight", "I8")


def test_buffers_of_old_checkpoints_are_let_pass(folder):
    edit_tensors(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    load(folder)


def test_a_tied_model_that_only_has_its_head(twin_folder, tmp_path):
    folder = shutil.copytree(make_twin("llama-tied", twin_folder), tmp_path / "twin")
    expected = load(folder)._embedding
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert torch.equal(load(folder)._embedding, expected)
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, "model.embed_tokens.weight")


def test_progress_reaches_the_end(folder):
    seen = []
    load_decoder(open_checkpoint(folder), torch.float32, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] > 0.95 * seen[-1][1]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, ["T5ForConditionalGeneration", "LlamaForCausalLM"]),
        ({"architectures": None}, ["no architecture"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        ({"hidden_act": "mish"}, ["hidden_act", "mish"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ({"num_attention_heads": 5, "num_key_value_heads": 1}, ["num_attention_heads", "hidden_size"]),
        ({"head_dim": 7}, ["head_dim", "even"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_type", "'su'", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor", "None"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "per layer type"]),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            ["short_factor", "list of 8"],
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 1}},
            ["high_freq_factor", "low_freq_factor"],
        ),
        ({"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 3}, ["layer_types"]),
        (
            {"architectures": ["GPT2LMHeadModel"], "scale_attn_by_inverse_layer_idx": True},
            ["inverse_layer_idx", "True"],
        ),
        ({"architectures": ["GPTBigCodeForCausalLM"], "add_cross_attention": True}, ["add_cross_attention"]),
        ({"architectures": ["OPTForCausalLM"], "layer_norm_elementwise_affine": False}, ["elementwise_affine"]),
        ({"architectures": ["GPTJForCausalLM"], "rotary_dim": 20}, ["rotary_dim", "at most 16"]),
        ({"architectures": ["PhiForCausalLM"], "qk_layernorm": True}, ["qk_layernorm"]),
        ({"architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 0.2}, ["even", "3 elements"]),
        (
            {"architectures": ["BloomForCausalLM"], "apply_residual_connection_post_layernorm": True},
            ["apply_residual_connection_post_layernorm"],
        ),
        ({"architectures": ["MptForCausalLM"], "attn_config": {"alibi": False}}, ["alibi", "False"]),
        ({"architectures": ["MptForCausalLM"], "attn_config": {"qk_ln": True}}, ["qk_ln"]),
        ({"architectures": ["MptForCausalLM"], "attn_config": {"clip_qkv": -1.0}}, ["clip_qkv", "at least 0"]),
        ({"architectures": ["MptForCausalLM"], "attn_config": {"softmax_scale": 0}}, ["softmax_scale", "above 0"]),
        ({"architectures": ["OlmoeForCausalLM"], "clip_qkv": -1.0}, ["clip_qkv", "above 0"]),
        ({"architectures": ["OlmoeForCausalLM"], "clip_qkv": 0}, ["clip_qkv", "above 0"]),
        ({"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": -50.0}, ["attn_logit_softcapping"]),
        ({"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 0}, ["attn_logit_softcapping"]),
        ({"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": -30.0}, ["final_logit_softcapping"]),
        ({"architectures": ["Gemma3ForCausalLM"], "final_logit_softcapping": 0.0}, ["final_logit_softcapping"]),
        ({"architectures": ["MPTForCausalLM"], "norm_type": "rmsnorm"}, ["norm_type", "rmsnorm"]),
        ({"architectures": ["MptForCausalLM"], "logit_scale": "inv_sqrt_d_model"}, ["logit_scale"]),
        (
            {"architectures": ["FalconForCausalLM"], "new_decoder_architecture": True, "parallel_attn": False},
            ["parallel_attn"],
        ),
        ({"architectures": ["FalconForCausalLM"], "num_ln_in_parallel_attn": 2}, ["num_ln_in_parallel_attn"]),
        ({"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True}, ["use_bidirectional"]),
        ({"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"rope_type": "linear"}}, ["rope_parameters"]),
        ({"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 9}, ["num_experts_per_tok", "8"]),
        ({"architectures": ["Qwen2MoeForCausalLM"], "mlp_only_layers": [1]}, ["mlp_only_layers"]),
        ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}, ["decoder_sparse_step"]),
        (
            {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}},
            ["quantization_config", "mxfp4"],
        ),
        ({"architectures": ["GptOssForCausalLM"], "swiglu_limit": 5.0}, ["swiglu_limit", "5.0"]),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "chunked_attention", "x"]},
            ["layer_types", "chunked_attention"],
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_is_not_implemented(changes, parts):
    with pytest.raises(CheckpointError) as caught:
        translate(LLAMA | changes)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def rope(kind, **parameters):
    return {"rope_scaling": {"rope_type": kind, "factor": 2.0} | parameters}


LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"architectures": 5}, "architectures"),
        ({"architectures": [["Llama"]]}, "architectures"),
        ({"quantization_config": "awq"}, "quantization_config (awq)"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"architectures": ["GPT2LMHeadModel"], "activation_function": {}}, "activation_function"),
        ({"architectures": ["MptForCausalLM"], "attn_config": "x"}, "attn_config"),
        ({"architectures": ["MptForCausalLM"], "attn_config": {"softmax_scale": -1}}, "softmax_scale"),
        ({"architectures": ["MptForCausalLM"], "attn_config": {"alibi_bias_max": -1e9}}, "alibi_bias_max"),
        ({"architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"architectures": ["Gemma3ForCausalLM"], "rope_scaling": "x"}, "rope_scaling"),
        ({"architectures": ["OPTForCausalLM"], "ffn_dim": 8, "word_embed_proj_dim": []}, "word_embed_proj_dim"),
        ({"architectures": ["FalconForCausalLM"], "num_ln_in_parallel_attn": "x"}, "num_ln_in_parallel_attn"),
        (
            {"architectures": ["XGLMForCausalLM"], "ffn_dim": 8, "hidden_size": 2, "num_attention_heads": 1},
            "hidden_size",
        ),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 1} | rope("yarn"), "rope_theta"),
        (rope(["yarn"]), "rope_type"),
        (rope("linear", factor=0), "factor"),
        (rope("linear", factor=float("inf")), "factor"),
        (rope("linear", factor=-2.0), "factor"),
        (rope("linear", factor=1e20), "factor"),
        (rope("dynamic") | {"head_dim": 2}, "rope_type"),
        (rope("yarn", original_max_position_embeddings=0), "original_max_position_embeddings"),
        (rope("yarn", original_max_position_embeddings=64.5), "original_max_position_embeddings"),
        (rope("longrope", original_max_position_embeddings=1, **LONG), "original_max_position_embeddings"),
        (rope("yarn", beta_fast=-1), "beta_fast"),
        (rope("yarn", beta_slow=1e-320), "beta_slow"),
        (rope("yarn", mscale=-1.0, mscale_all_dim=1.0), "mscale"),
        (rope("yarn", truncate="x"), "truncate"),
        (rope("longrope", **LONG | {"short_factor": [1.0] * 7 + ["x"]}), "short_factor"),
        (rope("longrope", **LONG | {"long_factor": [0] * 8}), "long_factor"),
        (rope("llama3", **BANDS | {"low_freq_factor": 0}), "low_freq_factor"),
    ],
    ids=str,
)
def test_a_malformed_setting_is_refused_by_its_name(changes, key):
    with pytest.raises(CheckpointError, match=re.escape(key)):
        translate(LLAMA | changes)


ODD_VALUES = (None, -1, 0, 1, 0.5, 1e400, 1e300, 10**400, "x", "", [], {}, [["a"]], True)
ODDLY_TREATED = (
    "llama-yarn-mscale",
    "llama-dynamic",
    "llama-linear",
    "llama-llama3",
    "llama-longrope",
    "phi3-longrope",
    "gpt2",
    "opt",
    "xglm",
    "gpt-neox",
    "gptj",
    "bloom",
    "mpt-clipped",
    "falcon",
    "gemma2",
    "gemma3-linear",
    "cohere2",
    "qwen2-alternating",
    "qwen2-moe",
    "gpt-oss",
)


def config_of(name):
    twin = TWINS[name]
    config = getattr(transformers, f"{twin.config}Config")(**(BASE | twin.settings)).to_dict()
    return json.loads(json.dumps(config)) | {"architectures": [twin.architecture]}


def mutations(config):
    """The configuration with each key set to each odd value, nested keys as well."""
    for key, value in config.items():
        yield from (config | {key: odd} for odd in ODD_VALUES)
        if isinstance(value, dict):
            yield from (config | {key: inner} for inner in mutations(value))


def positions_are_numbers(spec):
    positions, few = spec.positions, torch.arange(4)
    if isinstance(positions, Rotary):
        ropes = {each for each in positions.ropes if each is not None}
        tables = [inverse_frequencies(each, positions.dim, few) * attention_factor(each) for each in ropes]
    else:
        tables = [sinusoids(few, spec.hidden_size)] if isinstance(positions, Sinusoidal) else []
    return all(table.isfinite().all() for table in tables)


@pytest.mark.parametrize("name", ODDLY_TREATED)
def test_whatever_a_setting_is_it_is_read_or_refused(name):
    refusals = 0
    for config in mutations(config_of(name)):
        try:
            spec = translate(config).spec
        except CheckpointError:
            refusals += 1
            continue
        assert positions_are_numbers(spec), config
        assert positions_are_numbers(spec.serving(spec.stretched_positions)), config
        assert sizes_of(spec).total > 0
    assert refusals > 50, "most of these values are nonsense"


def test_mpt_may_be_spelled_as_in_its_own_code():
    config = LLAMA | {"architectures": ["MptForCausalLM"]}
    assert translate(config | {"architectures": ["MPTForCausalLM"]}) == translate(config)


def test_a_clip_of_0_is_none_for_mpt_as_in_transformers():
    config = LLAMA | {"architectures": ["MptForCausalLM"]}
    assert translate(config | {"attn_config": {"clip_qkv": 0}}).spec == translate(config).spec


def test_mistral_without_a_word_about_windows_has_the_default_one():
    config = LLAMA | {"architectures": ["MistralForCausalLM"]}
    assert translate(config).spec.windows == (4096,) * 3
    assert translate(config | {"sliding_window": None}).spec.windows == (None,) * 3


GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 384,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
}


def test_a_family_may_spell_settings_its_own_way():
    spec = translate(GPT2).spec
    assert (spec.hidden_size, spec.num_layers, spec.num_heads, spec.max_positions) == (64, 3, 4, 512)
    assert translate(GPT2 | {"num_key_value_heads": 2}).spec.num_kv_heads == 4, (
        "GPT-2 has no groups, as in transformers"
    )


def test_a_refusal_spells_a_setting_as_the_configuration_does():
    for name in ("n_embd", "hidden_size"):
        config = {key: value for key, value in GPT2.items() if key != "n_embd"} | {name: "64"}
        with pytest.raises(CheckpointError, match=rf"config.json: {name} = '64'"):
            translate(config)


def test_a_merged_tensor_of_a_wrong_shape(twin_folder, tmp_path):
    folder = shutil.copytree(make_twin("gpt-neox", twin_folder), tmp_path / "twin")
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(191, 64)}))
    refused(folder, name, "[191, 64]", "[192, 64]")


def test_a_missing_expert(twin_folder, tmp_path):
    folder = shutil.copytree(make_twin("mixtral", twin_folder), tmp_path / "twin")
    name = "model.layers.2.block_sparse_moe.experts.3.w1.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, name, "lack")


def test_a_checkpoint_whose_names_lack_their_first_word_is_read(twin_folder, tmp_path):
    """As GPT-2's on the hub, with the masks that it keeps among its tensors."""
    folder = shutil.copytree(make_twin("gpt2", twin_folder), tmp_path / "twin")
    expected = load(folder)._embedding

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    edit_tensors(folder, rename)
    assert torch.equal(load(folder)._embedding, expected)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 512),
        ({"type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "linear", "factor": 8.0}, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 512),
        ({"rope_type": "default"}, 512),
    ],
    ids=lambda value: str(value.get("rope_type", "dynamic")) if isinstance(value, dict) else str(value),
)
def test_a_rope_that_stretches_what_was_trained_makes_the_longest_context_longer(rope, longest):
    assert translate(LLAMA | {"rope_scaling": rope}).spec.max_positions == longest


def test_a_longrope_serves_the_trained_length_unless_asked_for_more():
    spec = make_longrope().spec
    assert (spec.max_positions, spec.stretched_positions) == (64, 512)
    assert spec.serving(64) == spec.serving(0) == spec
    longer = spec.serving(65)
    assert (longer.max_positions, longer.stretched_positions) == (512, 0)
    assert all(rope.stretched for rope in longer.positions.ropes)
    plain = translate(LLAMA).spec
    assert plain.serving(10_000) == plain, "and the worker refuses it"


def make_longrope():
    rope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    return translate(LLAMA | {"rope_scaling": rope, "original_max_position_embeddings": 64})
