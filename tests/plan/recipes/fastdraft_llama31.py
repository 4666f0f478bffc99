"""FastDraft (arXiv 2411.11055, section 6) at full size: Llama-3.1-8B-Instruct and its 150M draft, the same pipeline."""

import dataclasses

from fastdraft_phi3 import recipe as phi3

from jaxdraft.models import presets
from jaxdraft.recipe import HFModel


def recipe(
    *,
    target: HFModel = HFModel("meta-llama/Llama-3.1-8B-Instruct"),  # noqa: B008 (immutable)
):
    made = phi3(target=target, draft=presets.fastdraft_llama31_150m)
    return dataclasses.replace(made, title="FastDraft: a 150M draft for Llama-3.1-8B-Instruct")
