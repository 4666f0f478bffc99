"""Losses by name: the project's own and a user's."""

import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.losses import DPACE, TVDPlusPlus, Weights, resolve


def test_a_loss_of_the_project():
    assert resolve("TVDPlusPlus") is TVDPlusPlus
    assert resolve("jaxdraft.losses.tvdpp:TVDPlusPlus") is TVDPlusPlus


def test_weights_are_found_the_same_way():
    assert resolve("DPACE", Weights) is DPACE
    with pytest.raises(ConfigError, match=r"no weights 'TVD'.*There: AdaSPEC, DPACE.*MyWeights"):
        resolve("TVD", Weights)


@pytest.mark.parametrize(
    "name, message",
    [
        ("TVDPlusPlu", "did you mean 'TVDPlusPlus'.*There: CrossEntropy, JSD, KL, .*TVDPlusPlusSampled"),
        ("Loss", "no loss 'Loss'"),
        ("no_such_module:MyLoss", "cannot import 'no_such_module'.*PYTHONPATH"),
        ("json:JSONDecoder", "no loss 'JSONDecoder' in 'json'.*There: none"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve(name)


def test_a_module_that_fails(tmp_path, monkeypatch):
    (tmp_path / "thawed_losses.py").write_text(THAWED)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'thawed_losses' fails with TypeError: cannot inherit non-frozen dataclass"):
        resolve("thawed_losses:Thawed")


THAWED = """
from dataclasses import dataclass
from jaxdraft.losses import Loss

@dataclass
class Thawed(Loss):
    pass
"""
