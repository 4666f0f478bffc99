"""Losses by name: the project's own and a user's."""

import jax
import numpy as np
import pytest

from jaxdraft.errors import ConfigError
from jaxdraft.losses import DPACE, Positions, Shared, TVDPlusPlus, Weights, chunked, resolve

USERS_MODULE = """
from dataclasses import dataclass
import jax.numpy as jnp
from jaxdraft.losses import Loss, log_probs

@dataclass(frozen=True)
class SkewKL(Loss):
    skew: float = 0.1

    def rows(self, draft_logits_CV, target, labels_C):
        log_p_CV, log_q_CV = log_probs(draft_logits_CV, self.temperature), target.log_probs(self.temperature)
        mixture_CV = self.skew * jnp.exp(log_q_CV) + (1 - self.skew) * jnp.exp(log_p_CV)
        return jnp.sum(jnp.exp(log_q_CV) * (log_q_CV - jnp.log(mixture_CV)), axis=-1)
"""


def test_a_loss_of_the_project():
    assert resolve("TVDPlusPlus") is TVDPlusPlus
    assert resolve("jaxdraft.losses.tvdpp:TVDPlusPlus") is TVDPlusPlus


def test_a_users_loss(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    loss = resolve("my_losses:SkewKL")(temperature=0.8, skew=0.25)
    assert loss.skew == 0.25

    rng = np.random.default_rng(0)
    hidden_ND, head_DV, target_ND = (rng.standard_normal(s, np.float32) for s in ((40, 8), (8, 30), (40, 8)))
    positions = Positions(np.zeros(40, int), np.ones(40, np.float32), target_ND)
    total = lambda hidden_ND: chunked(loss, hidden_ND, head_DV, positions, Shared(head_DV), chunk=16).sum
    grad_ND = jax.jit(jax.grad(total))(hidden_ND)
    p_NV, q_NV = (jax.nn.softmax(x @ head_DV / 0.8) for x in (hidden_ND, target_ND))
    s_NV = -q_NV * 0.75 * p_NV / (0.25 * q_NV + 0.75 * p_NV)
    expected_ND = (s_NV - p_NV * s_NV.sum(-1, keepdims=True)) / 0.8 @ head_DV.T
    np.testing.assert_allclose(grad_ND, expected_ND, rtol=1e-4, atol=1e-6)


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
