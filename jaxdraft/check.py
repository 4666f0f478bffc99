"""``jaxdraft check``: would an engine take this draft for this target, and if not, what to do."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from jaxdraft.check_rules import ENGINES, RULES, Pair, Verdict
from jaxdraft.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one rule found for one engine.

    Attributes:
      engine: one of ``ENGINES``.
      rule: in a few words.
      verdict: ``"fail"`` would not work; ``"warn"`` works, with a limit; ``"skip"`` could not be looked at here.
      found: what is there.
      remedy: what to do about it.
    """

    engine: str
    rule: str
    verdict: Verdict
    found: str
    remedy: str = ""


def check_pair(target: Path, draft: Path, engines: Sequence[str] = ENGINES) -> list[Finding]:
    """Every rule's finding for every engine asked for; a folder that cannot be read is a finding too.

    Args:
      target: Hugging Face folder of the model to be accelerated.
      draft: Hugging Face folder of the draft.
      engines: of ``ENGINES``.
    """
    pair, findings = Pair(target, draft), []
    for name, rule in RULES.items():
        try:
            results = list(rule(pair))
        except (ConfigError, OSError, SafetensorError) as error:
            results = [(ENGINES, "fail", str(error), "mend that file: two whole model folders are needed")]
        findings += [
            Finding(engine, name, verdict, found, remedy)
            for whose, verdict, found, remedy in results
            for engine in whose
            if engine in engines
        ]
    return sorted(findings, key=lambda finding: engines.index(finding.engine))


def run_check(target: Path, draft: Path, engines: Sequence[str]) -> bool:
    """Prints the table of findings and whether each engine would take the draft; returns whether all would."""
    findings = check_pair(target, draft, engines)
    width = max(len(finding.rule) for finding in findings)
    for engine in engines:
        print(engine)
        own = [finding for finding in findings if finding.engine == engine]
        for finding in own:
            print(f"  {finding.verdict:<5} {finding.rule:<{width}}  {finding.found}")
            if finding.verdict != "ok" and finding.remedy:
                print(f"  {'':<5} {'':<{width}}  -> {finding.remedy}")
        fails, warns = (sum(finding.verdict == kind for finding in own) for kind in ("fail", "warn"))
        print(f"  {'would not work' if fails else 'works'}: {fails} failed, {warns} warnings\n")
    return not any(finding.verdict == "fail" for finding in findings)
