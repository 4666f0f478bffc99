"""Shards of answers on disk: whole or not there, each question once, every loss named."""

import json

import numpy as np
import pytest

from jaxdraft import answers
from jaxdraft.data.prompts import Prompt
from jaxdraft.data.records import Format
from jaxdraft.data.token_scores import TokenScores
from jaxdraft.errors import ConfigError
from jaxdraft.questions import Question

GENERATOR = {"dtype": "float32"}


def question(number, length=4, writer="target", temperature=0.0):
    prompt = Prompt(f"p{number}", tuple(range(1, length + 1)), "text")
    return Question(number, f"p{number}@{temperature:g}", prompt, temperature, 1.0, 8, writer)


def line(question, tokens=(5, 2), **fields):
    given = {"id": question.id, "number": question.number, "writer": question.writer}
    return {
        **given, "temperature": question.temperature, "finish": "eos",
        "prompt_tokens": list(question.prompt.tokens), "tokens": list(tokens), **fields,
    }  # fmt: skip


@pytest.fixture
def shards(tmp_path):
    questions = [question(i, length=(4, 300)[i % 3 == 0], writer=("a", "target")[i % 2]) for i in range(20)]
    return answers.cut(questions, 3, tmp_path)


def fill(shards):
    for shard in shards:
        answers.commit(shard, [line(question, tokens=(question.number, 2)) for question in shard.questions], GENERATOR)


def test_a_shard_holds_questions_of_one_kind_in_their_order(shards):
    assert sorted(q.number for shard in shards for q in shard.questions) == list(range(20))
    for shard in shards:
        assert 1 <= len(shard.questions) <= 3
        assert len({(q.writer, q.bucket) for q in shard.questions}) == 1
        numbers = [q.number for q in shard.questions]
        assert numbers == sorted(numbers)
    assert [shard.writer for shard in shards] == sorted(shard.writer for shard in shards)
    assert shards[0].path.name == f"responses-00000-of-{len(shards):05d}.jsonl"


def test_what_is_missing_is_what_was_not_committed_whole(shards):
    said = []
    assert answers.missing(shards, GENERATOR, said.append) == list(range(len(shards)))
    fill(shards[2:])
    shards[3].record.unlink()  # killed between the two
    shards[4].path.unlink()
    damaged = bytearray(shards[5].path.read_bytes())
    damaged[10] ^= 1
    shards[5].path.write_bytes(damaged)
    assert answers.missing(shards, GENERATOR, said.append) == [0, 1, 3, 4, 5]
    assert len(said) == 3
    assert f"{shards[3].path.name} has no record" in said[0]
    assert f"{shards[4].path.name} is gone" in said[1]
    assert f"{shards[5].path.name} is damaged" in said[2]
    with pytest.raises(ConfigError, match="written with dtype 'float32', here it is 'bfloat16'"):
        answers.missing(shards, {"dtype": "bfloat16"}, said.append)


@pytest.mark.parametrize("content", [b"", b'{"answers": 3, "sha2', b"\xff", b"[]", b'{"sha256": {}}'])
def test_a_damaged_record_is_named_and_its_shard_written_again(shards, content):
    fill(shards)
    shards[1].record.write_bytes(content)
    said = []
    assert answers.missing(shards, GENERATOR, said.append) == [1]
    assert f"{shards[1].record.name} is damaged" in said[0]


def test_every_question_is_accounted_for(shards):
    fill(shards)
    first = shards[0]
    lost = {"id": first.questions[0].id, "writer": "a", "temperature": 0.0, "error": "empty answer"}
    same = line(first.questions[2], tokens=(first.questions[1].number, 2), finish="length")
    answers.commit(first, [lost, line(first.questions[1], tokens=(first.questions[1].number, 2)), same], GENERATOR)
    account = answers.account(shards, {"duplicate": 3, "blank": 1}, GENERATOR)
    assert account["prompts"] == {"read": 24, "asked": 20, "skipped": {"duplicate": 3, "blank": 1}}
    assert account["answers"] == {"asked": 20, "written": 19, "errors": {"empty answer": 1}}
    assert account["finish"] == {"eos": 18, "length": 1}
    assert account["duplicates"] == 1
    assert account["tokens"] == 38
    assert account["lengths"]["0"]["max"] == account["lengths"]["0"]["mean"] == 2
    assert sum(account["lengths"]["0"]["histogram"]["counts"]) == 19
    assert [shard["answers"] for shard in account["shards"]] == [len(shard.questions) for shard in shards]


def test_a_file_that_holds_other_questions_is_named(shards):
    fill(shards)
    swapped = [json.loads(text) for text in shards[1].path.read_text().splitlines()][::-1]
    answers.commit(shards[1], swapped, GENERATOR)
    with pytest.raises(ConfigError, match=shards[1].path.name):
        answers.account(shards, {}, GENERATOR)


def test_a_file_that_answers_other_prompts_of_the_same_ids_is_named(shards):
    fill(shards)
    answers.commit(shards[1], [line(question, prompt_tokens=[9]) for question in shards[1].questions], GENERATOR)
    with pytest.raises(ConfigError, match=f"{shards[1].path.name} answers other prompts than are asked now"):
        answers.account(shards, {}, GENERATOR)


def test_examples_are_prompt_and_answer_with_the_labels_of_both(shards):
    fill(shards)
    lost = {"id": shards[0].questions[0].id, "error": "empty answer"}
    answers.commit(shards[0], [lost, *(line(question) for question in shards[0].questions[1:])], GENERATOR)
    found = list(answers.examples(shards, lambda question: [0] * (len(question.prompt.tokens) - 1) + [1]))
    assert len(found) == 19
    tokens, mask = found[0]["tokens"], found[0]["loss_mask"]
    length = len(shards[0].questions[1].prompt.tokens)
    assert tokens == [*range(1, length + 1), 5, 2]
    assert mask == [0] * (length - 1) + [1, 1, 1]


def test_what_the_target_said_lies_beside_the_tokens_it_was_said_of(shards):
    shard, format = shards[0], Format(64, 400, {"k": 2, "vocabulary": 400})
    first, second, third = shard.questions
    log_probs = np.array([[-0.5, -1, -0.5, -2], [-1, -2, -3, -4]], np.float16)
    said = [TokenScores(np.array([[n, 7], [8, 9]], np.uint16), log_probs * n) for n in (1, 2)]
    lost = {"id": second.id, "error": "empty answer"}
    files = answers.commit(shard, [line(first), lost, line(third)], GENERATOR, said, format)
    assert files == [shard.path, shard.scores, shard.record]
    found = list(answers.examples([shard], lambda question: [0] * len(question.prompt.tokens), format))
    for example, question, expected in zip(found, (first, third), said, strict=True):
        length = len(question.prompt.tokens)
        own = slice(length - 1, length + 1)
        np.testing.assert_array_equal(example["target_ids"][own], expected.target_ids)
        np.testing.assert_array_equal(example["target_log_probs"][own], expected.target_log_probs)
        mass = np.exp(example["target_log_probs"].astype(float))[[*range(length - 1), length + 1]]
        np.testing.assert_allclose(mass.sum(-1), 1, atol=3 * 2**-11)  # no label, and a distribution all the same
    shard.scores.unlink()
    lines = []
    assert answers.missing([shard], GENERATOR, lines.append) == [0]
    assert f"{shard.scores.name} is gone" in lines[0]
