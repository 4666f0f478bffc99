"""A Llama folder as a GGUF file, the one format that llama.cpp reads (ggml's docs/gguf.md)."""

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from jaxdraft.tokenizer_backends import read_sentencepiece

ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
FORMATS = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path, path: Path, template: str) -> None:
    """The weights in float32, the tokenizer.model and a chat template of a Llama with tied embeddings."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    model = read_sentencepiece(folder / "tokenizer.model")
    ids = range(model.get_piece_size())
    kinds = [
        UNKNOWN if model.is_unknown(i) else CONTROL if model.is_control(i) else BYTE if model.is_byte(i) else NORMAL
        for i in ids
    ]
    fields = {
        "general.architecture": (STRING, "llama"),
        "general.alignment": (UINT32, ALIGNMENT),
        "llama.context_length": (UINT32, config["max_position_embeddings"]),
        "llama.embedding_length": (UINT32, width),
        "llama.block_count": (UINT32, config["num_hidden_layers"]),
        "llama.feed_forward_length": (UINT32, config["intermediate_size"]),
        "llama.attention.head_count": (UINT32, heads),
        "llama.attention.head_count_kv": (UINT32, kv_heads),
        "llama.attention.layer_norm_rms_epsilon": (FLOAT32, config["rms_norm_eps"]),
        "llama.rope.dimension_count": (UINT32, width // heads),
        "llama.rope.freq_base": (FLOAT32, config["rope_theta"]),
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, [model.id_to_piece(i) for i in ids])),
        "tokenizer.ggml.scores": (ARRAY, (FLOAT32, [model.get_score(i) for i in ids])),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, kinds)),
        "tokenizer.ggml.bos_token_id": (UINT32, model.bos_id()),
        "tokenizer.ggml.eos_token_id": (UINT32, model.eos_id()),
        "tokenizer.ggml.eot_token_id": (UINT32, model.bos_id()),  # these models end a story with it
        "tokenizer.ggml.add_bos_token": (BOOL, True),
        "tokenizer.chat_template": (STRING, template),
    }
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, turned in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:  # llama.cpp rotates neighbouring rows, transformers rows half a head apart
                tensor = tensor.reshape(turned, 2, -1, width).swapaxes(1, 2).reshape(tensor.shape)
        tensors[_name(name)] = np.ascontiguousarray(tensor, np.float32)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)))
        for key, (kind, value) in fields.items():
            file.write(_string(key) + struct.pack("<I", kind) + _value(kind, value))
        offset = 0
        for name, tensor in tensors.items():
            file.write(_string(name) + struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *tensor.shape[::-1]))
            file.write(struct.pack("<IQ", 0, offset))  # 0: float32
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        for tensor in tensors.values():
            file.write(bytes(-file.tell() % ALIGNMENT) + tensor.tobytes())


def _name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(kind: int, value) -> bytes:
    if kind == ARRAY:
        of, items = value
        return struct.pack("<IQ", of, len(items)) + b"".join(_value(of, item) for item in items)
    return _string(value) if kind == STRING else struct.pack(FORMATS[kind], value)
