"""Checkpoints: what comes back is what went in, on any mesh, or it does not come back at all."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft.checkpoint import Checkpoints
from jaxdraft.errors import ConfigError
from jaxdraft.file_hashes import write_hashes
from jaxdraft.fingerprint import fingerprint


def state(step):
    return {"w": jax.random.normal(jax.random.key(step), (64, 32)), "n": jnp.asarray(step, jnp.int32)}


ABSTRACT = jax.eval_shape(lambda: state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, keep_every=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step))
        checkpoints.wait()
    return folder


def test_the_newest_state_comes_back(saved):
    with Checkpoints(saved, keep_every=1) as checkpoints:
        assert checkpoints.steps == [1, 2, 3]
        step, restored = checkpoints.restore_newest(ABSTRACT)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, restored, state(3))


def test_only_the_newest_two_and_the_kept_ones_stay(tmp_path):
    with Checkpoints(tmp_path, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state(step))
        checkpoints.wait()
        assert checkpoints.steps == [4, 6, 7]


def test_an_empty_folder_has_no_state(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_newest(ABSTRACT) is None


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_flipped_bits_are_noticed_by_the_arrays_alone_and_the_step_before_is_used(saved, tmp_path, place):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    (folder / "3.json").unlink()
    arrays = [p for p in (folder / "3" / "state").rglob("*") if p.is_file() and p.stat().st_size > 4096]
    path = max(arrays, key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    for i in range(8):  # a single byte may be one that holds no number
        content[int(place * len(content)) + i] ^= 1 << i
    path.write_bytes(content)
    with Checkpoints(folder, keep_every=1) as checkpoints:
        step, restored = checkpoints.restore_newest(ABSTRACT)
        assert checkpoints.steps == [1, 2]
        checkpoints.save(3, state(3))
        checkpoints.wait()
        assert checkpoints.steps == [1, 2, 3]
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, restored, state(2))


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "commit_success.txt", "meta/metadata", "state/_sharding"])
def test_any_damaged_file_is_named(saved, tmp_path, file, caplog):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    content = bytearray((folder / "3" / file).read_bytes())
    content[-2] ^= 1
    (folder / "3" / file).write_bytes(content)
    with Checkpoints(folder, keep_every=1) as checkpoints:
        assert checkpoints.restore_newest(ABSTRACT)[0] == 2
    assert f"{folder}/3/{file} is damaged" in caplog.text


def test_a_hidden_file_that_something_else_put_there_is_no_damage(saved, tmp_path, caplog):
    folder = tmp_path / "shared"
    shutil.copytree(saved, folder)
    (folder / "3" / "state" / ".nfs0001").write_text("")
    with Checkpoints(folder, keep_every=1) as checkpoints:
        assert checkpoints.restore_newest(ABSTRACT)[0] == 3
    assert not caplog.messages


def test_a_checkpoint_that_is_gone_is_missed(saved, tmp_path, caplog):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "3")
    with Checkpoints(folder, keep_every=1) as checkpoints:
        assert checkpoints.restore_newest(ABSTRACT)[0] == 2
    assert f"{folder}/3 is gone" in caplog.text


def test_a_save_that_was_killed_before_it_had_its_name_is_none(saved, tmp_path, caplog):
    folder = tmp_path / "killed"
    shutil.copytree(saved, folder)
    (folder / "3").rename(folder / "3.orbax-checkpoint-tmp")
    write_hashes(folder / "3.orbax-checkpoint-tmp", folder / "3.json", complete=False)
    with Checkpoints(folder, keep_every=1) as checkpoints:
        assert checkpoints.restore_newest(ABSTRACT)[0] == 2
    assert not caplog.text


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(tmp_path):
    mine = {"settings": {"batch_size": 8, "data": "corpus"}, "shape": None, "seed": 0, "inputs": {"corpus": "a"}}
    with Checkpoints(tmp_path, identity=mine) as checkpoints:
        checkpoints.save(1, state(1))
    with Checkpoints(tmp_path, identity=mine) as checkpoints:
        assert checkpoints.restore_newest(ABSTRACT)[0] == 1
    other = {**mine, "settings": {"batch_size": 16, "data": "corpus"}, "inputs": {"corpus": "b"}}
    with Checkpoints(tmp_path, identity=other) as checkpoints:
        with pytest.raises(ConfigError, match="batch_size was 8 and is 16; input corpus has changed"):
            checkpoints.restore_newest(ABSTRACT)
        assert checkpoints.steps == [1]


def test_what_is_not_finite_is_not_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FloatingPointError, match="after step 1"):
            checkpoints.save(1, {**state(1), "m": jnp.array([0.0, jnp.inf])})
        assert checkpoints.steps == []


def test_a_run_never_starts_over_silently(saved, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    for step in ("1", "2", "3"):
        shutil.rmtree(folder / step / "state")
    with Checkpoints(folder, keep_every=1) as checkpoints, pytest.raises(OSError, match=r"no checkpoint .* intact"):
        checkpoints.restore_newest(ABSTRACT)


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_another_shape_or_dtype_is_refused(saved, change):
    wrong = {"shape": ((32, 32), jnp.float32), "dtype": ((64, 32), jnp.bfloat16)}[change]
    with Checkpoints(saved, keep_every=1) as checkpoints, pytest.raises(OSError, match="checkpoint 3 in"):
        checkpoints.restore({**ABSTRACT, "w": jax.ShapeDtypeStruct(*wrong)}, 3)


def test_the_fingerprint_sees_flips_and_swaps():
    base = jnp.arange(8, dtype=jnp.float32)
    assert (fingerprint([base]) == fingerprint([base + 0])).all()
    assert (fingerprint([base]) != fingerprint([base.at[3].set(3.0000002)])).all()
    assert (fingerprint([base]) != fingerprint([base[::-1]])).all()
