#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0, gguf 0.19.0) reading the largest Gemma 2 and Gemma 3 (27B) from GGUF. Their queries are
# divided by the root of 144 and of 168 (hidden size / heads), those of all smaller ones by the root of 256, a head's size.
# No setting of the file says so: llama.cpp tells the 27B by its 46 and 62 blocks.
# Guess before looking: what a file does not say is a matter of the reader, and this one is made for both families by name,
# so it knows the same rule; and if not, the setting that it cannot know is asked for or warned of.
# Seen: query_pre_attn_scalar is 256 for both without a word, so scores are smaller than the model's by a quarter and a fifth.
# Every weight is right, no weight is missing, and the logits are those of another model. (Models here are as deep as the
# originals and narrow; what enters the scale, hidden size over heads and a head's 128 numbers, is the originals'.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
cat >"$work/run.py" <<'PY'
import sys

import gguf
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

HEADS, KV, HEAD, WIDE, WORDS, WINDOW = 1, 1, 128, 16, 64, 8
NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "post_attention_norm",
         "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
# the scale, blocks and every so manieth block that sees everything, of google/gemma-2-27b and google/gemma-3-27b
LARGEST = {"gemma2": (144, 46, 2, Gemma2Config, Gemma2ForCausalLM), "gemma3": (168, 62, 6, Gemma3TextConfig, Gemma3ForCausalLM)}


def write(model, name, file):
    config, writer = model.config, gguf.GGUFWriter(file, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(WINDOW)
    writer.add_vocab_size(WORDS)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    else:
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    for key, value in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        value = value + 1 if key.endswith("norm.weight") else value
        stem = key.removeprefix("model.").removesuffix(".weight")
        called = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(stem)
        if called is None:
            _, block, inside = stem.split(".", 2)
            called = f"blk.{block}.{NAMES[inside]}"
        writer.add_tensor(f"{called}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


changed = False
for name, (scale, blocks, each, config, kind) in LARGEST.items():
    torch.manual_seed(0)
    types = ["full_attention" if (block + 1) % each == 0 else "sliding_attention" for block in range(blocks)]
    made = dict(vocab_size=WORDS, hidden_size=scale * HEADS, intermediate_size=WIDE, num_hidden_layers=blocks,
                num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=HEAD, max_position_embeddings=256,
                sliding_window=WINDOW, layer_types=types, initializer_range=0.1, pad_token_id=0, bos_token_id=2, eos_token_id=1)
    model = kind(config(**made, query_pre_attn_scalar=scale)).eval()
    flat = kind(config(**made, query_pre_attn_scalar=256)).eval()
    flat.load_state_dict(model.state_dict())
    write(model, name, f"{sys.argv[1]}/{name}.gguf")
    read = AutoModelForCausalLM.from_pretrained(sys.argv[1], gguf_file=f"{name}.gguf", dtype=torch.float32).eval()
    weights = max((value - model.state_dict()[key]).abs().max().item() for key, value in read.state_dict().items())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits, wanted, other = (one(ids, use_cache=False).logits for one in (read, model, flat))
    off, unlike = ((logits - which).abs().max().item() for which in (wanted, other))
    said = read.config.query_pre_attn_scalar
    print(f"{name}, {blocks} blocks: scale {said}, the model's {scale}; weights off by {weights:.1g}; logits off by "
          f"{off:.2g} from the model's (largest {wanted.abs().max():.2g}), by {unlike:.1g} from those of a scale of 256")
    changed |= not (said == 256 and weights < 1e-6 and off > 0.1 and unlike < 1e-3)
sys.exit(changed)
PY
"$work/env/bin/python" "$work/run.py" "$work" 2>/dev/null
