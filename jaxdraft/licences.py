"""Licences: what a model's is called, and what it says of models that learn from its output.

Names are SPDX's: an identifier of its list, ``LicenseRef-…`` for one that is not on it (with the Hugging Face hub's
name for it), ``NOASSERTION`` where nothing is known. What stands here is quoted from the licences and is no advice.
"""

import collections
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxdraft.errors import ConfigError
from jaxdraft.home import open_home
from jaxdraft.models.hub import model_card
from jaxdraft.recipe import HFModel, Recipe
from jaxdraft.untrusted import check_file, read_json

NOASSERTION = "NOASSERTION"
_ID = r"[A-Za-z0-9][A-Za-z0-9.-]*\+?"
_TERM = rf"\(*{_ID}(?: WITH {_ID})?\)*"
_EXPRESSION = re.compile(rf"{_TERM}(?: (?:AND|OR) {_TERM})*")
# A value beside its key, or a list's only one.
_FIELD = r"^(license|license_name):(?:[ \t]*\[?[ \t]*|[ \t]*\r?\n[ \t]*-[ \t]+)[\"']?([\w.+-]+)(?!.*,|.*\n[ \t]*-[ \t])"
_CARD_BYTES = 1 << 16  # a card's front matter comes first


class Terms(NamedTuple):
    """What a licence says of models that learn from the output of one that is under it.

    Attributes:
      forbids: whether it forbids to train them.
      clause: its words.
      where: to read it.
    """

    forbids: bool
    clause: str
    where: str


_META = "https://github.com/meta-llama/llama-models/blob/main/models"


def _llama_before_3_1(name: str, folder: str) -> Terms:
    clause = (
        "1.b.v: “You will not use the Llama Materials or any output or results of the Llama Materials to improve any "
        f"other large language model (excluding {name} or derivative works thereof).”"
    )
    return Terms(True, clause, f"{_META}/{folder}/LICENSE")


def _llama(folder: str) -> Terms:
    clause = (
        "1.b.i: “If you use the Llama Materials or any outputs or results of the Llama Materials to create, train, "
        "fine tune, or otherwise improve an AI model, which is distributed or made available, you shall also include "
        "“Llama” at the beginning of any such AI model name”, and display “Built with Llama”."
    )
    return Terms(False, clause, f"{_META}/{folder}/LICENSE")


TERMS = {
    "LicenseRef-llama2": _llama_before_3_1("Llama 2", "llama2"),
    "LicenseRef-llama3": _llama_before_3_1("Meta Llama 3", "llama3"),
    "LicenseRef-llama3.1": _llama("llama3_1"),
    "LicenseRef-llama3.2": _llama("llama3_2"),
    "LicenseRef-llama3.3": _llama("llama3_3"),
    "LicenseRef-llama4": _llama("llama4"),
}
# Names of models that come without a card, as in a folder with the weights alone.
_KNOWN = {
    r"llama-2-\d+b": "LicenseRef-llama2",
    r"meta-llama-3-\d+b": "LicenseRef-llama3",
    r"(meta-)?llama-3\.1-\d+b": "LicenseRef-llama3.1",
    r"llama-3\.2-\d+b": "LicenseRef-llama3.2",
    r"llama-3\.3-\d+b": "LicenseRef-llama3.3",
    r"llama-4-": "LicenseRef-llama4",
    r"phi-(3|3\.5|4)(-|$)": "MIT",
    r"(mistral-7b|mixtral-8x(7|22)b)-": "Apache-2.0",
    r"qwen2\.5-(0\.5|1\.5|7|14|32)b": "Apache-2.0",
    r"qwen3-\d": "Apache-2.0",
}
# SPDX's spelling of the hub's names, which are in small letters.
_SPDX = {
    name.lower(): name
    for name in (
        *("AFL-3.0", "AGPL-3.0", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0"),
        *(
            f"CC-BY-{part}"
            for part in ("2.0", "2.5", "3.0", "4.0", "NC-4.0", "NC-SA-4.0", "NC-ND-4.0", "SA-3.0", "SA-4.0")
        ),
        *("CDLA-Permissive-2.0", "CDLA-Sharing-1.0", "EPL-2.0", "GPL-2.0", "GPL-3.0", "ISC", "LGPL-3.0", "MIT"),
        *("MPL-2.0", "ODbL-1.0", "ODC-By-1.0", "Unlicense", "WTFPL", "Zlib"),
    )
}


def is_expression(text: str) -> bool:
    """Whether a text has the form of an SPDX licence expression: ``MIT OR (Apache-2.0 WITH LLVM-exception)``."""
    return bool(_EXPRESSION.fullmatch(text)) and text.count("(") == text.count(")")


def model_licence(name: str, revision: str | None = None, given: str | None = None) -> str:
    """The SPDX name of a model's licence; downloads no more than its card.

    Args:
      name, revision: as of ``jaxdraft.models.hub.model_folder``.
      given: what the user says it is, which is believed.

    Raises:
      ConfigError: ``given`` is no SPDX expression.
    """
    if given is not None:
        if not is_expression(given):
            raise ConfigError(
                f"licence {given!r} is no SPDX expression, such as MIT, LicenseRef-llama2 or {NOASSERTION}"
            )
        return given
    card = Path(name) / "README.md" if Path(name).is_dir() else None
    if card is not None and (found := _of_card(card)):
        return found
    for known in _names(name):
        for pattern, licence in _KNOWN.items():
            if re.match(pattern, known.rstrip("/").split("/")[-1].lower()):
                return licence
    if card is None and (fetched := model_card(name, revision)):
        return _of_card(fetched) or NOASSERTION
    return NOASSERTION


def target_licence(recipe: Recipe) -> str | None:
    """``model_licence`` of a recipe's target; ``None`` where the recipe trains it."""
    target = recipe.target
    return model_licence(target.path, target.revision, target.licence) if isinstance(target, HFModel) else None


def objection(recipe: Recipe, licence: str | None) -> str:
    """Why a target's licence asks for the user's word before the recipe learns from its output; empty where not."""
    terms, stage = TERMS.get(licence or ""), recipe.learns_from_target
    if stage is None or terms is None or not terms.forbids or not isinstance(recipe.target, HFModel):
        return ""
    return (
        f"target {recipe.target.path} is under {licence}, which says in {terms.clause} Stage {stage!r} learns from its "
        f"output. Read {terms.where}; if you may do this, add --accept-license; if its licence is another, say so with "
        "--set target.licence=SPDX-ID"
    )


def check_licence(recipe: Recipe, workdir: Path | str, accept: bool = False) -> dict[str, str]:
    """What ``run.json`` says of the target's licence, about which a user is asked once in a run directory.

    Raises:
      ConfigError: it forbids what the recipe does, and was not accepted.
    """
    licence = target_licence(recipe)
    if licence is None:
        return {}
    found = {"target_licence": licence}
    if told := objection(recipe, licence):
        home = open_home(workdir, None)
        home.fetch_records()
        path = home.folder / "run.json"
        if not accept and not (path.is_file() and read_json(path).get("accepted_licence") == licence):
            raise ConfigError(told)
        found["accepted_licence"] = licence
    return found


def source_licences(manifest: Mapping[str, Any]) -> list[str]:
    """Those of the texts or the prompts that a manifest of packed rows was made of, in their order."""
    source = manifest["source"]
    if isinstance(source["settings"], list):
        settings = source["settings"]
        texts = [*map(collections.ChainMap, source.get("provenance", [{}] * len(settings)), settings)]
    else:
        texts = source["settings"].get("prompts", [])
    return [text.get("licence") or NOASSERTION for text in texts]


def _names(name: str) -> Iterator[str]:
    """What a model is called, where it lies and by its own configuration."""
    yield name.partition("@")[0]
    if (config := Path(name) / "config.json").is_file():
        yield str(read_json(config).get("_name_or_path", ""))


def _of_card(card: Path) -> str | None:
    """What the front matter of a model card says; ``None`` where it says nothing."""
    if not card.is_file():
        return None
    check_file(card)
    with card.open("rb") as file:
        text = file.read(_CARD_BYTES).decode(errors="replace")
    if not (front := re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)):
        return None
    fields = dict(re.findall(_FIELD, front[1], re.MULTILINE))
    name = fields.get("license")
    if name == "other":
        name = fields.get("license_name", name)
    if name in (None, "other", "unknown"):
        return None
    return _SPDX.get(name.lower(), f"LicenseRef-{re.sub('[^A-Za-z0-9.-]', '-', name)}")
