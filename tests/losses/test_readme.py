"""The README on losses: its table is the docstrings', and its example is a loss that trains."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdraft import losses
from jaxdraft.losses import Loss, Positions, Shared, check_loss, chunked, resolve

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.split("## Losses")[1].split("\n## ")[0]
LINES = re.findall(r"^\| `.*$", SECTION.split("\n### ")[0], re.M)
ROWS = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in LINES]
OURS = {name: kind for name, kind in vars(losses).items() if isinstance(kind, type) and issubclass(kind, Loss)}


def said(kind):
    """A class's docstring on one line."""
    return " ".join(kind.__doc__.split())


def test_the_table_has_every_loss():
    names = [re.match(r"`(\w+)", name).group(1) for name, *_ in ROWS]
    assert sorted(names) == sorted(OURS.keys() - {"Loss"})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_a_row_is_what_the_docstring_says(row):
    name, settings = re.fullmatch(r"`(\w+)(?:\((\w+=[^)]*)\))?`", row[0]).groups()
    formula, gradient, source = (cell.replace("\\|", "|") for cell in row[1:])
    text = said(OURS[name])
    assert formula in text
    assert f"Gradient: {gradient}" in text
    for number in source.split(", "):
        assert number in text
    field, _, default = (settings or "").partition("=")
    if default not in ("", "…"):
        assert str({f.name: f.default for f in dataclasses.fields(OURS[name])}[field]) == default


def test_the_example_is_a_loss_that_trains(tmp_path, monkeypatch):
    code = re.search(r"```python\n# my_losses.py\n(.*?)```", SECTION, re.S).group(1)
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    loss = resolve("my_losses:SkewKL")(temperature=0.8, skew=0.25)
    check_loss(loss, stored=True)

    rng = np.random.default_rng(0)
    hidden_ND, head_DV, target_ND = (rng.standard_normal(s, np.float32) for s in ((40, 8), (8, 30), (40, 8)))
    positions = Positions(np.zeros(40, int), np.ones(40, np.float32), target_ND)
    total = lambda hidden_ND: chunked(loss, hidden_ND, head_DV, positions, Shared(head_DV), chunk=16).sum
    grad_ND = jax.jit(jax.grad(total))(hidden_ND)
    p_NV, q_NV = (jax.nn.softmax(x @ head_DV / 0.8) for x in (hidden_ND, target_ND))
    s_NV = -q_NV * 0.75 * p_NV / (0.25 * q_NV + 0.75 * p_NV)
    expected_ND = (s_NV - p_NV * jnp.sum(s_NV, -1, keepdims=True)) / 0.8 @ head_DV.T
    np.testing.assert_allclose(grad_ND, expected_ND, rtol=1e-4, atol=1e-6)
