"""What class a token is of, and what each class counts, by hand."""

import pytest

from jaxdraft.decode import SpeculativeResult
from jaxdraft.evaluate.token_classes import CLASSES, TokenClasses, acceptance_by_class, verdicts


class Words:
    """A tokenizer whose pieces are given."""

    def __init__(self, pieces):
        self.pieces = pieces

    def encode(self, text, bos):
        return [self.pieces.index(text)]

    def continuation(self, prompt, ids):
        return "".join(self.pieces[i] for i in ids)


PIECES = {
    "a": "a",
    "b": " b",
    "c": " c",
    "x1": "x1",
    "comma": ",",
    "quote": "“",
    "plus": "+=",
    "newline": "\n",
    "three": "   ",
    "one": " ",
    "paragraph": "\n\n  ",
    "broken": "\N{REPLACEMENT CHARACTER}",
    "eos": "",
}
CODE = {name: i for i, name in enumerate(PIECES)}


def classes(prompt, answer):
    return TokenClasses(Words(list(PIECES.values()))).of(
        [CODE[name] for name in prompt.split()], [CODE[name] for name in answer.split()]
    )


@pytest.mark.parametrize(
    "prompt, answer, expected",
    [
        ("a", "comma comma b", "first punctuation other"),
        ("a", "b quote plus x1 broken eos", "first punctuation punctuation other other other"),
        # Indent is white space before a line's text, in one token or several; a line's end alone is none.
        ("a", "b newline three b three newline", "first other indent other other other"),
        ("a", "b newline three one b", "first other indent indent other"),
        ("a", "b paragraph one a", "first indent indent other"),
        ("a newline", "three one b", "first indent other"),
        ("three", "b three", "first other"),
        # Three in a row that stand in the prompt; the first two may be its own last.
        ("a b c x1 a b", "x1 a b c", "first other copied copied"),
        ("a b c x1 a b", "c x1 b a", "first copied other other"),
        ("a b comma a", "b comma c", "first punctuation other"),
        ("a b", "c a b", "first other other"),
    ],
)
def test_a_token_is_of_the_first_class_that_fits(prompt, answer, expected):
    assert classes(prompt, answer) == expected.split()


def test_real_tokenizers_break_python_into_the_same_classes(shared_data):
    from jaxdraft.tokenizers import load_tokenizer

    for name in ("llama2", "llama3", "phi3-mini"):
        tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
        prompt = tokenizer.encode('def add(a, b):\n    """Add two numbers."""\n')
        answer = tokenizer.encode("x = a + b\n    return x", bos=False)
        found = TokenClasses(tokenizer).of(prompt, answer)
        texts = [
            tokenizer.continuation(prompt, answer[: i + 1])[len(tokenizer.continuation(prompt, answer[:i])) :]
            for i in range(len(answer))
        ]
        assert found[0] == "first"
        assert [text.strip() for text, kind in zip(texts, found, strict=True) if kind == "punctuation"] == ["=", "+"]
        assert [text.strip(" ") for text, kind in zip(texts, found, strict=True) if kind == "indent"] == [""]


def test_accepted_and_refused_positions_share_a_denominator():
    # Two accepted and one refused; all three and a bonus token; two more, of which the limit cuts the second.
    result = SpeculativeResult(
        tokens=[0, 1, 2, 3, 4, 5, 6, 7], accepted=[2, 3, 2], cut=True, drafted=[3, 3, 3], rejected=[9, -1, 9]
    )
    assert verdicts(result) == [True, True, False, True, True, True, None, True]
    kinds = ["first", "other", "punctuation", "other", "copied", "other", "punctuation", "other"]
    found = acceptance_by_class([result], [kinds])
    assert list(found) == list(CLASSES)
    counts = {name: (line["accepted"], line["proposed"], line["rate"]) for name, line in found.items()}
    assert counts == {
        "first": (1, 1, 1),
        "indent": (0, 0, None),
        "punctuation": (0, 1, 0),
        "copied": (1, 1, 1),
        "other": (4, 4, 1),
    }


def test_a_draft_that_stopped_early_proposed_no_more():
    stopped = SpeculativeResult(tokens=[0, 1, 2], accepted=[1, 0], cut=False, drafted=[1, 2], rejected=[-1, 9])
    assert verdicts(stopped) == [True, None, False]
