"""Tiny random models of many transformers families, so that every rule meets every architecture.

Secateur has no class per family: blocks, sites and replay are found by rules. Such a rule is worth what
it was tried on, so FAMILIES lists dense, fused, mixture-of-experts and hybrid models, and `tiny_model`
shrinks the family's own default config: `SMALL` sets each field that the config happens to have,
`SPECIAL` holds what a family needs besides. Nothing is downloaded.

The sizes are not arbitrary. Every matrix reads a multiple of 8 inputs (2:4 and 4:8 fit). Experts are
wide enough that routers, short convolutions and state matrices stay under 5 % of the block weights.
Attention windows are shorter than the 32 tokens a test feeds, so a local block replayed with a global
mask gives other numbers. Noise is added to *every* parameter: transformers starts biases at zero and
norms at one, and a rule that forgets either would pass unnoticed.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

DENSE = """
    apertus arcee biogpt bitnet bloom codegen cohere cohere2 cwm diffllama ernie4_5 exaone4 falcon
    gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj
    granite helium hunyuan_v1_dense internlm3 llama minicpm3 ministral ministral3 mistral mpt nanochat
    nemotron olmo olmo2 olmo3 opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2
    vaultgemma xglm
""".split()  # noqa: SIM905
MIXTURE = """
    afmoe cohere2_moe deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe gpt_oss
    granitemoe granitemoeshared hunyuan_v1_moe jetmoe llama4_text longcat_flash mimo_v2_flash minimax
    minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open
""".split()  # noqa: SIM905
HYBRID = """
    bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2
    nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma zamba zamba2
""".split()  # noqa: SIM905
FAMILIES = tuple(DENSE + MIXTURE + HYBRID)
FUSED = "mixtral qwen2_moe qwen3_moe gpt_oss deepseek_v3 olmoe jamba glm4_moe minimax_m2 lfm2_moe".split()  # noqa: SIM905
"""Of those with fused experts that lose some: one of each arrangement."""

# Families that keep block weights neither in Linear or Conv1D nor in experts with transformers' flags
# (is_transposed, has_bias, has_gate), so that less than 95 % of a block is visible to the general rules.
UNCOVERED = frozenset({"jetmoe", "llama4_text", "longcat_flash", "zamba"})

BLOCKS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, ACTIVE, VOCAB = 4, 64, 128, 4, 2, 16, 4, 2, 128

SMALL = {
    # every family
    "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "vocab_size": VOCAB, "max_position_embeddings": 128,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "sliding_window": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # other names for the same things
    "intermediate_size": FFN, "ffn_dim": FFN, "ffn_hidden_size": FFN, "n_inner": FFN,
    "num_kv_heads": KV_HEADS,
    "word_embed_proj_dim": HIDDEN, "rotary_dim": 8, "query_pre_attn_scalar": HEAD_DIM,
    # low-rank attention
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    # mixtures of experts
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": ACTIVE, "num_experts_per_token": ACTIVE, "moe_topk": ACTIVE, "moe_k": ACTIVE,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "num_dense_layers": 1,
    # state spaces and linear attention
    "state_size": 4, "time_step_rank": 8, "mamba_d_state": 4, "mamba_dt_rank": 8, "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16, "mamba_chunk_size": 16, "use_mamba_kernels": False,
    "linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip

_ALTERNATE = ["linear_attention", "hybrid"] * 2
_CONVOLUTION = ["conv", "full_attention"] * 2
SPECIAL: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "altup_num_inputs": 8, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0], "laurel_rank": 16,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2,
    },
    "gemma4_text": {
        "global_head_dim": 32, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2": {"layer_types": _CONVOLUTION},
    "lfm2_moe": {"layer_types": _CONVOLUTION},
    "longcat_flash": {"num_layers": BLOCKS, "expert_ffn_hidden_size": 64, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"intermediate_size": 3 * FFN},
    "zamba": {"layers_block_type": _ALTERNATE},
    "zamba2": {
        "layers_block_type": _ALTERNATE, "head_dim": 2 * HIDDEN // HEADS, "num_key_value_heads": HEADS,
        "use_shared_attention_adapter": True, "adapter_rank": 8,
    },
}  # fmt: skip


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The family's default config with `SMALL` and `SPECIAL` applied, its kinds of block in turn."""
    default = AutoConfig.for_model(model_type)
    names = default.to_dict()

    def settable(name: str) -> bool:
        """Whether the config has the field, under this name or the one it is an alias of, and lets it be set."""
        name = default.attribute_map.get(name, name)
        return name in names and not isinstance(getattr(type(default), name, None), property)

    fields = {name: value for name, value in SMALL.items() if settable(name)}
    for name in ("layer_types", "mlp_layer_types"):
        if settable(name) and (kinds := getattr(default, name)):
            fields[name] = (list(dict.fromkeys(kinds)) * BLOCKS)[:BLOCKS]
    if "kv_lora_rank" in fields:  # the latent is expanded to every head
        fields["num_key_value_heads"] = HEADS
    return AutoConfig.for_model(model_type, **{**fields, **SPECIAL.get(model_type, {})})


def tiny_model(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of the family in eval mode; the same seed gives the same bits.

    The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()
