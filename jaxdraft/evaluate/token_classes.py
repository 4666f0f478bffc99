"""Which kinds of tokens a draft foresees: acceptance by class of token.

A draft position is reached if every draft token before it in its block was accepted. Its class is that of the token the
text has there in the end: the draft's own where it was accepted, the target's in its place where it was refused. So
both outcomes have one denominator, and ``rate`` answers "of the text's punctuation that the draft had to foresee, how
much did it?". Classed by the token proposed, a draft that proposes commas everywhere would spoil its own figure for
punctuation, and no two drafts would be asked the same. The bonus token after a block that was accepted in full was not
proposed by anyone and is not counted; neither is what an end token or the limit cut off.
"""

from collections.abc import Sequence
from typing import Any

from jaxdraft.decode import SpeculativeResult
from jaxdraft.evaluate.metrics import ratio_of_sums, with_interval
from jaxdraft.tokenizers import Tokenizer

FIRST, INDENT, PUNCTUATION, COPIED, OTHER = CLASSES = ("first", "indent", "punctuation", "copied", "other")
_COPIED = 3  # tokens in a row


class TokenClasses:
    """Puts every token of an answer into the first class that fits.

    - ``first``: the answer's first token, before which the draft has seen nothing of the target's own.
    - ``indent``: nothing but white space between the beginning of a line and its text.
    - ``punctuation``: visible, and no letter or digit in it.
    - ``copied``: it and the two tokens before it stand in the prompt in this order: what prompt look-up decoding
      (Saxena 2023) would propose too. The two may be the prompt's own last.
    - ``other``: the rest.

    A token's text is what it adds after a letter. Of a character that is spread over several byte tokens none has a
    text of its own: they are ``copied`` or ``other``.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", bos=False)
        self._texts: dict[int, str] = {}

    def of(self, prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
        """The class of each token of ``answer``."""
        tokens, start = [*prompt, *answer], len(prompt)
        in_prompt = {tuple(prompt[i - _COPIED : i]) for i in range(_COPIED, start + 1)}
        classes, begins_line = [], False
        for i, token in enumerate(tokens):
            text = self._text(token)
            last_line = text.rpartition("\n")[2]
            blank = begins_line if last_line == text else True  # what stands in the line before it
            begins_line = blank and (not last_line or last_line.isspace())
            if i < start:
                continue
            if i == start:
                classes.append(FIRST)
            elif blank and text.isspace() and last_line:
                classes.append(INDENT)
            elif (visible := text.strip().strip("\N{REPLACEMENT CHARACTER}")) and not any(map(str.isalnum, visible)):
                classes.append(PUNCTUATION)
            elif tuple(tokens[i + 1 - _COPIED : i + 1]) in in_prompt:
                classes.append(COPIED)
            else:
                classes.append(OTHER)
        return classes

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.continuation(self._before, [token])
        return self._texts[token]


def verdicts(result: SpeculativeResult) -> list[bool | None]:
    """Of each token of an answer: whether what the draft proposed there was accepted; ``None`` of a bonus token."""
    found: list[bool | None] = []
    for accepted, drafted in zip(result.accepted, result.drafted, strict=True):
        found += [*[True] * accepted, False if accepted < drafted else None]
    return found[: len(result.tokens)]


def acceptance_by_class(results: Sequence[SpeculativeResult], classes: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Of each class: draft positions reached (``proposed``), accepted among them, and their ratio with its interval.

    Args:
      results: one per prompt.
      classes: of each token of their answers.
    """
    found = {}
    for name in CLASSES:
        mine = [
            [
                verdict
                for verdict, kind in zip(verdicts(result), kinds, strict=True)
                if kind == name and verdict is not None
            ]
            for result, kinds in zip(results, classes, strict=True)
        ]
        accepted, proposed = list(map(sum, mine)), list(map(len, mine))
        rate = with_interval("rate", ratio_of_sums(accepted, proposed))
        found[name] = {"accepted": sum(accepted), "proposed": sum(proposed), **rate}
    return found
