import json
import logging

import pytest

from jaxdraft.data.prompts import Prompt, PromptFile, example_id, read_prompts
from jaxdraft.errors import ConfigError


def prompt_file(tmp_path, *rows, **settings) -> PromptFile:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return PromptFile(str(path), **settings)


def test_forms_ids_and_extra_fields(tmp_path, tokenizer):
    ids = tokenizer.encode("import os")
    rows = {"id": 7, "prompt": "def f():", "reference": "r", "source": "s"}, "", {"tokens": ids, "temperature": 1}
    prompts = read_prompts(prompt_file(tmp_path, *rows), tokenizer)
    first = tuple(tokenizer.encode("def f():"))
    assert first[0] == tokenizer.bos_id
    assert prompts == [
        Prompt("7", first, "def f():", "r", extra={"source": "s"}),
        Prompt("3", tuple(ids), "import os", temperature=1.0),
    ]


def test_long_prompts_are_left_out_and_counted(tmp_path, tokenizer, caplog):
    rows = [{"prompt": text} for text in ("a", "b" * 500, "c", "d" * 500, "e")]
    with caplog.at_level(logging.WARNING):
        kept = read_prompts(prompt_file(tmp_path, *rows, max_tokens=20, limit=3), tokenizer)
    assert [prompt.text for prompt in kept] == ["a", "c", "e"]
    assert "left out 2 prompts: more than 20 tokens" in caplog.text
    assert [p.text for p in read_prompts(prompt_file(tmp_path, *rows, limit=1), tokenizer)] == ["a"]


@pytest.mark.parametrize(
    "rows, message",
    [
        (['{"prompt": "a"}', '{"prompt"'], r"line 2 \(Expecting.*\): not JSON"),
        ([{"prompt": "a"}, {"text": "a"}], "line 2: needs exactly one of prompt, messages, tokens, has none"),
        ([{"prompt": "a", "tokens": [3]}], "line 1: .* has prompt and tokens"),
        (["[]"], "line 1: needs exactly one"),
        ([{"prompt": "a \ud83d b"}], "line 1: not Unicode text"),
        ([{"prompt": "a", "id": "\ude00"}], "line 1: not Unicode text"),
        ([{"prompt": 3}], "line 1: 'prompt' is int, not text"),
        ([{"prompt": "a", "reference": 3}], "line 1: 'reference' is int, not text"),
        ([{"tokens": []}], "line 1: the prompt is empty"),
        ([{"tokens": [1, 512]}], "line 1: token 512 is not among the tokenizer's 512 ids"),
        ([{"tokens": [True]}], "line 1: token True"),
        ([{"messages": [{"role": "user"}]}], 'line 1: each of "messages"'),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "no chat template"),
        ([{"prompt": "a", "top_p": 0}], r"line 1: 'top_p' is 0: it must be a number in \(0, 1\]"),
        ([{"prompt": "a", "temperature": True}], "line 1: 'temperature' is True"),
        ([{"prompt": "a", "max_new_tokens": 1.5}], "line 1: 'max_new_tokens' is 1.5"),
        ([{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}], "line 2: id 'x' was used before"),
        ([], "no prompts"),
    ],
)
def test_errors_name_file_and_line(tmp_path, tokenizer, rows, message):
    with pytest.raises(ConfigError, match=message):
        read_prompts(prompt_file(tmp_path, *rows), tokenizer)


def test_missing_file_and_nothing_that_fits(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="no such file of prompts"):
        read_prompts(PromptFile(str(tmp_path / "none.jsonl")), tokenizer)
    with pytest.raises(ConfigError, match="line 1: more than 1 tokens; not one"):
        read_prompts(prompt_file(tmp_path, {"prompt": "abc"}, max_tokens=1), tokenizer)


def test_fingerprint_follows_the_content(tmp_path):
    before = prompt_file(tmp_path, {"prompt": "a"}).fingerprint()
    assert prompt_file(tmp_path, {"prompt": "a"}).fingerprint() == before
    assert prompt_file(tmp_path, {"prompt": "b"}).fingerprint() != before


def test_real_prompts(shared_data, tokenizer):
    for name, count in (("dolly_151.jsonl", 151), ("HumanEval.jsonl.gz", 164), ("xsum_t0.jsonl", 200)):
        assert len(read_prompts(PromptFile(str(shared_data / "prompts" / name)), tokenizer)) == count


@pytest.mark.slow
def test_messages_go_through_the_chat_template(tmp_path, shared_data):
    from jaxdraft.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(shared_data / "tokenizers" / "phi3-mini")
    messages = [{"role": "user", "content": "Hello"}]
    source = prompt_file(tmp_path, {"id": "m", "messages": messages})
    [prompt] = source.prompts(tokenizer)
    assert prompt.tokens == tuple(tokenizer.encode(tokenizer.render(messages), bos=False))


def test_example_ids_are_pinned_to_the_name():
    ids = [example_id(name) for name in ("1", "open:queue.Queue.get", "naïve")]
    assert ids == [1941079659, 358682369, 2648207352]
    assert all(0 <= number < 2**32 for number in ids)
