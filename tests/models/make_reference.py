"""Writes tests/models/golden: logits of tiny models by transformers, which the decoder has to give too.

Needs Python 3.11 with torch and transformers (the files were made with 2.13.0 and 5.23.0), not jaxdraft:

    PYTHON tests/models/make_reference.py            writes the files
    PYTHON tests/models/make_reference.py --compare  prints how far this transformers is from the files

transformers 4.44.2 gives the same logits, except for phi3-4k-window: its eager Phi-3 leaves sliding_window out.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from reference_weights import weights
from safetensors.numpy import save_file

GOLDEN = Path(__file__).with_name("golden")
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA = SHAPE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
LLAMA3 = LLAMA | {
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
PHI3 = SHAPE | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "original_max_position_embeddings": 4096,
    "sliding_window": None,
}
PHI3_128K = PHI3 | {
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 32,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.02, 1.1, 1.25, 1.3, 1.6, 1.9, 2.0],
        "long_factor": [1.1, 1.5, 2.5, 4.0, 8.0, 15.0, 30.0, 32.0],
    },
}
MISTRAL = SHAPE | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
QWEN2 = SHAPE | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": False,
    "rope_theta": 1000000.0,
}
TIED = {"tie_word_embeddings": True}
SHORT = list(range(24))
FAR = [*range(8), *range(4000, 4004), *range(8188, 8196), *range(20000, 20004), *range(100000, 100004)]
VARIANTS = {
    "llama2": (LLAMA, SHORT),
    "llama2-tied": (LLAMA | TIED, SHORT),
    "llama31": (LLAMA3, FAR),
    "llama31-tied": (LLAMA3 | TIED, FAR),
    "phi3-4k": (PHI3, SHORT),
    "phi3-4k-tied": (PHI3 | TIED, SHORT),
    "phi3-4k-window": (PHI3 | {"sliding_window": 11}, SHORT),
    "phi3-128k-short": (PHI3_128K, SHORT),
    "phi3-128k-long": (PHI3_128K, list(range(48))),
    "mistral": (MISTRAL, SHORT),
    "mistral-window": (MISTRAL | {"sliding_window": 9}, SHORT),
    "qwen2": (QWEN2, SHORT),
    "qwen2-tied": (QWEN2 | TIED, SHORT),
}


def logits(folder: Path, config: dict, tokens: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, dict]:
    """What transformers computes from the folder that it finds there, and the shapes of its tensors."""
    (folder / "config.json").write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(folder)
    empty = transformers.AutoModelForCausalLM.from_config(read)
    shapes = {name: list(value.shape) for name, value in empty.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    save_file({n: weights(n, tuple(s)) for n, s in shapes.items()}, folder / "model.safetensors", {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        # With a mask given, transformers 5 does not take a jump of positions for the start of another text.
        inputs = {"input_ids": torch.tensor(tokens[None]), "position_ids": torch.tensor(positions[None])}
        out = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False)
    return out.logits[0].numpy(), shapes


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, (config, positions) in VARIANTS.items():
        tokens = (np.arange(len(positions)) * 37 + 5) % SHAPE["vocab_size"]
        with tempfile.TemporaryDirectory() as folder:
            found, shapes = logits(Path(folder), config, tokens, np.asarray(positions))
        path = GOLDEN / f"{name}.npz"
        if "--compare" in sys.argv:
            print(f"{name:<18} {np.abs(np.load(path)['logits'] - found).max():.1e}  of {np.abs(found).max():.1f}")
            continue
        texts = {"config": json.dumps(config), "shapes": json.dumps(shapes), "version": transformers.__version__}
        np.savez_compressed(path, tokens=tokens, positions=positions, logits=found, **texts)


if __name__ == "__main__":
    main()
