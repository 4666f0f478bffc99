"""What ``jaxdraft inspect`` tells of model folders and run directories."""

import json

import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.inspect import inspect


def test_a_real_model_is_told(shared_data, capsys):
    inspect(shared_data / "models" / "stories260K-hf")
    out = capsys.readouterr().out
    for fact in ("5 layers, hidden 64", "8 heads of 8, 4 for keys and values", "F32", "640 B a token", "512 pieces"):
        assert fact in out


def test_a_run_is_told(tmp_path, capsys):
    stages = [{"name": "text", "kind": "Corpus"}, {"name": "distill", "kind": "Train"}]
    recipe = {"title": "Tiny", "target": "target", "seed": 3, "stages": stages}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "text").mkdir()
    record = {"kind": "Corpus", "status": "done", "seconds": 1.25, "summary": {"tokens": 9}}
    (tmp_path / "text" / "stage.json").write_text(json.dumps(record))
    inspect(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("text") and "done" in line and "tokens 9" in line for line in lines)
    assert any(line.startswith("distill") and "Train, not run" in line for line in lines)


def test_neither_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"neither config\.json"):
        inspect(tmp_path)


def test_a_wrong_value_in_a_model_s_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "64"}))
    with pytest.raises(ConfigError, match=r'config\.json: hidden_size is "64", but must be a whole number'):
        inspect(tmp_path)
