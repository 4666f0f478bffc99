import numpy as np
import pytest

from jaxdraft.decode.batching import bucket_length, prompt_batches
from jaxdraft.errors import ConfigError

DEFAULTS = {
    "max_new_tokens": 8,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "example_ids": None,
    "batch_size": 2,
    "vocab_size": 10,
    "max_positions": 512,
}


def test_bucket_lengths_are_powers_of_two():
    assert [bucket_length(n) for n in (1, 128, 129, 256, 257, 1024, 1025)] == [128, 128, 256, 256, 512, 1024, 2048]


def test_every_prompt_is_in_one_batch_with_its_own_settings():
    prompts = [[1] * n for n in (3, 200, 1, 128, 5)]
    limits, temperatures, ids = [1, 2, 3, 4, 5], [0.0, 0.1, 0.2, 0.3, 0.4], [9, 8, 7, 6, 2**32 - 1]
    batches = prompt_batches(
        prompts, **DEFAULTS | {"max_new_tokens": limits, "temperature": temperatures, "example_ids": ids}
    )
    assert [batch.indices for batch in batches] == [[0, 2], [3, 4], [1]]
    assert [batch.bucket for batch in batches] == [128, 128, 256]
    for batch in batches:
        assert batch.tokens_BS.shape == (2, batch.bucket + 5)
        for row, i in enumerate(batch.indices):
            assert batch.tokens_BS[row, : len(prompts[i])].tolist() == prompts[i]
            assert batch.length_B[row] == len(prompts[i])
            assert batch.end_B[row] == len(prompts[i]) + limits[i]
            assert batch.temperature_B[row] == np.float32(temperatures[i])
            assert batch.example_ids_B[row] == ids[i]


def test_fillers_are_done_before_they_start():
    (batch,) = prompt_batches([[1, 2, 3]], **DEFAULTS)
    assert batch.length_B.tolist() == [3, 1]
    assert batch.end_B.tolist() == [11, 1]
    assert batch.top_p_B.tolist() == [1, 1]
    assert batch.top_k_B.tolist() == [0, 0]


def test_no_prompts_no_batches():
    assert prompt_batches([], **DEFAULTS) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[10]]}, "prompt 0 has token ids from 10 to 10"),
        ({"prompts": [[-1]]}, "another tokenizer"),
        ({"prompts": [[1] * 505]}, "505 tokens and may grow by 8, past the model's 512"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": [1, 2]}, "one per prompt"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"example_ids": [-1]}, "example_ids"),
        ({"example_ids": [2**32]}, "example_ids"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings_are_named(change, message):
    settings = {"prompts": [[1, 2, 3]]} | DEFAULTS | change
    with pytest.raises(ConfigError, match=message):
        prompt_batches(settings.pop("prompts"), **settings)
