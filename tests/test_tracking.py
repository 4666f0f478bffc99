"""Logs of steps: cut off where a checkpoint stands, and damage to them is told by name."""

import json

import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.tracking import StepLog, read_jsonl


def written(path, steps):
    log = StepLog(path)
    for step in steps:
        log.write(step, {"loss": 1.0})
    log.sync()
    log.close()


def test_lines_behind_the_checkpoint_and_one_cut_short_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2, 3])
    path.write_bytes(path.read_bytes() + b'{"step": 4')
    StepLog(path, range(1, 3)).close()
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]


@pytest.mark.parametrize("damage", [b"\0" * 8, b"\xff", b"[1]"])
def test_a_damaged_line_is_told_with_the_file_and_the_remedy(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    written(path, [1, 2])
    _, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(damage + b"\n" + second + b"\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is damaged .*delete the folder"):
        StepLog(path, range(1, 3))
    path.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(ConfigError, match=r"lacks steps before 2, .*delete the folder"):
        StepLog(path, range(1, 3))
