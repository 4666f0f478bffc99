"""Decodes on one of eight devices and on meshes of all of them, for test_mesh.py.

Prints a JSON line for each number of shards: whether greedy and sampled answers, alone and with a draft, of batches
that run to their end and of a stream, are those of one device.
"""

import json

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdraft.decode import Request, Speculation, generate, speculative_generate, stream
from jaxdraft.models import Decoder, ModelConfig, for_decoding, init_params
from jaxdraft.models.decoder import model_shardings
from jaxdraft.sharding import Load, MeshShape

TARGET = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=768,  # wide: its weights lie by rows on a CPU
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    tie_embeddings=False,
    eos_ids=(5,),
)
DRAFT = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, num_kv_heads=2, eos_ids=(5,)
)
ROWS, NEW = 8, 24
UNEVEN = 6  # rows that do not divide over eight or four groups of devices


def on_mesh(config, seed, mesh):
    # Larger weights than a fresh model's, whose most likely tokens are nearly tied.
    params = jax.device_get(jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(seed))))
    to = model_shardings(config, mesh, scan=False)
    return Decoder(config, scan=False), jax.jit(for_decoding, static_argnums=0, out_shardings=to)(config, params)


def answers(mesh):
    target, draft = on_mesh(TARGET, 0, mesh), on_mesh(DRAFT, 1, mesh)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 96, int(count)).tolist() for count in rng.integers(3, 20, ROWS)]
    found = []
    for temperature in (0.0, 0.8):
        how = {"max_new_tokens": NEW, "temperature": temperature, "top_p": 0.9, "batch_size": ROWS}
        found.append(generate(*target, prompts, **how))
        results = speculative_generate(*target, *draft, prompts, speculation=Speculation(3), **how)
        found.append([(result.tokens, result.accepted) for result in results])
    return found + [streamed(target, *how) for how in ((None, 16), (None, UNEVEN), (draft, 16))]


def streamed(target, draft, batch_size):
    """More texts than rows, of all lengths; half of them sampled."""
    rng = np.random.default_rng(1)
    requests = [
        Request(
            key=key,
            tokens=rng.integers(0, 96, int(rng.integers(3, 20))).tolist(),
            max_new_tokens=int(rng.integers(1, NEW + 1)),
            temperature=0.8 * (key % 2),
            top_p=0.9,
            example_id=key,
        )
        for key in range(40)
    ]
    found = stream(*target, requests, batch_size=batch_size, longest=NEW, draft=draft, block_size=3)
    return {finished.request.key: finished.tokens for finished in found}


def main():
    train = MeshShape(data=8).build()
    expected = answers(Mesh(train.devices[:1], train.axis_names, axis_types=train.axis_types))
    for shards in (1, 2, 4):
        same = answers(MeshShape(decode_tensor=shards).for_decoding(train, Load())) == expected
        print(json.dumps({"shards": shards, "same": same}), flush=True)


if __name__ == "__main__":
    main()
