#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, gguf 0.19.0) reading a Llama from GGUF whose rotation is stretched for a longer context:
# once linearly (llama.rope.scaling.type and .factor), once as Llama 3.1 has it (factors in the tensor rope_freqs.weight).
# Guess before looking: both are years old and the very first architecture's, so the configuration gets rope_type
# "linear" and "llama3", or the load is refused.
# Seen: both load without a word as a model with rope_type "default". Nothing differs on the first token; later logits
# are those of the model without the stretch, to the bit, and not those of the model that was written.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
cat >"$work/run.py" <<'PY'
import sys

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HEADS, KV, HIDDEN = 4, 2, 64
NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
}


def as_llama_cpp(value, heads):
    """Rows of query and key as llama.cpp has them: the halves of a head taken in turn."""
    return value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


def write(model, kind, file):
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    else:
        plain = 1 / 10000.0 ** (torch.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    stored = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", stored["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", stored["model.norm.weight"])
    writer.add_tensor("output.weight", stored["lm_head.weight"])
    for block in range(config.num_hidden_layers):
        for name, called in NAMES.items():
            value = stored[f"model.layers.{block}.{name}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV}.get(called)
            writer.add_tensor(f"blk.{block}.{called}.weight", as_llama_cpp(value, heads) if heads else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


changed = False
for kind, rope in SCALED.items():
    torch.manual_seed(0)
    made = dict(vocab_size=64, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
                num_key_value_heads=KV, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.3)
    model = LlamaForCausalLM(LlamaConfig(**made, rope_parameters={"rope_theta": 10000.0, **rope})).eval()
    without = LlamaForCausalLM(LlamaConfig(**made)).eval()
    without.load_state_dict(model.state_dict())
    file = f"{sys.argv[1]}/{kind}.gguf"
    write(model, kind, file)
    read = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=f"{kind}.gguf", dtype=torch.float32).eval()
    ids = torch.arange(60)[None]
    with torch.no_grad():
        logits, wanted, plain = (one(ids).logits for one in (read, model, without))
    same, off = torch.equal(logits, plain), (logits - wanted).abs().max().item()
    print(f"{kind}: read as {read.config.rope_parameters}; as without scale: {same}; off by up to {off:.2f}")
    changed |= not (read.config.rope_parameters["rope_type"] == "default" and same and off > 0.1)
sys.exit(changed)
PY
"$work/env/bin/python" "$work/run.py" "$work" 2>/dev/null
