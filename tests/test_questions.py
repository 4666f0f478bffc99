"""What is asked of whom: by the prompt's id, the temperature and the seed alone."""

import collections
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from jaxdraft.data.conversations import user_turn
from jaxdraft.data.magpie import Magpie
from jaxdraft.data.prompts import Prompt
from jaxdraft.data.quarantine import Quarantine, Rejected
from jaxdraft.errors import ConfigError
from jaxdraft.losses import CrossEntropy
from jaxdraft.questions import ask, choice, with_system, written
from jaxdraft.recipe import Generate, Train, Written
from jaxdraft.tokenizers import load_tokenizer

IDS = [f"{i}@{temperature:g}" for i in range(5000) for temperature in (0.0, 1.0)]

# Llama-2-chat's, without a default system prompt.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system_message if loop.first else '')"
    " + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def phi3(shared_data):
    return load_tokenizer(shared_data / "tokenizers" / "phi3-mini")


@pytest.fixture(scope="module")
def llama2(shared_data, tmp_path_factory):
    return with_template(shared_data, tmp_path_factory, LLAMA2)


@pytest.fixture(scope="module")
def refusing(shared_data, tmp_path_factory):
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    return with_template(shared_data, tmp_path_factory, refuse + LLAMA2)


def with_template(shared_data, tmp_path_factory, template):
    folder = tmp_path_factory.mktemp("llama2") / "tokenizer"
    shutil.copytree(shared_data / "tokenizers" / "llama2", folder)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.mark.parametrize("shares", [{"target": 0.5, "a": 0.5}, {"a": 0.2, "b": 0.7, "target": 0.1}, {"a": 1.0}])
def test_every_writer_gets_its_share(shares):
    chosen = collections.Counter(choice(f"3/writer/{id}", shares) for id in IDS)
    for name, share in shares.items():
        error = (share * (1 - share) * len(IDS)) ** 0.5
        assert abs(chosen[name] - share * len(IDS)) <= 4 * error


def test_choices_differ_between_seeds_and_temperatures():
    shares = {"target": 0.5, "a": 0.5}
    chosen = {(id, seed): choice(f"{seed}/writer/{id}", shares) for id in IDS for seed in (0, 1)}
    same = sum(chosen[id, 0] == chosen[id, 1] for id in IDS)
    assert abs(same - 5000) < 4 * 50
    pairs = [chosen[f"{i}@0", 0] == chosen[f"{i}@1", 0] for i in range(5000)]
    assert abs(sum(pairs) - 2500) < 4 * 5000**0.5 / 2


def test_pinned_choice():
    """What a seed means may not change: old runs could not be repeated."""
    for shares in ({"t": 0.5, "a": 0.5}, {"a": 0.5, "t": 0.5}):
        assert "".join(choice(f"0/writer/{id}", shares) for id in IDS[:16]) == "aataaataaattaata"


class Given(NamedTuple):
    """Prompts that a test made, as a source."""

    found: tuple

    def prompts(self, tokenizer):
        return self.found


def asked(tokenizer, *prompts, positions=100, **changes):
    """The questions, and what was rejected by reason."""
    stage = Generate("made", prompts=(Given(prompts),), length=64, **{"temperatures": (0.0, 1.0), **changes})
    shape, quarantine = SimpleNamespace(max_positions=positions), Quarantine()
    recipe = SimpleNamespace(
        seed=0, stage=lambda name: Train(name, data="x", loss=CrossEntropy(), batch_size=1, steps=1)
    )
    context = SimpleNamespace(
        recipe=recipe,
        target_config=lambda: SimpleNamespace(eos_ids=(tokenizer.eos_id,)),
        tokenizer=tokenizer,
        target_shape=shape,
        trained_config=lambda stage: SimpleNamespace(max_positions=50),
    )
    return ask(stage, context, quarantine), quarantine.counts


def test_a_prompt_has_to_fit_with_the_answer_and_the_system_prompt_that_are_its_own(phi3):
    short = Prompt("short", (1,) * 60, "", max_new_tokens=40)
    long = replace(short, id="long", max_new_tokens=41)
    questions, rejected = asked(phi3, short, long, max_new_tokens=99)
    assert [(q.number, q.id) for q in questions] == [(0, "short@0"), (1, "short@1")]
    assert rejected == {"with its answer longer than the 100 positions of target": 1}
    messages = ({"role": "user", "content": "Hello"},)
    small, large = (Prompt(id, (1,), "", messages=messages, max_new_tokens=n) for id, n in (("a", 8), ("b", 80)))
    questions, rejected = asked(phi3, small, large, system_prompts=("Be brief. " * 8,))
    assert {q.prompt.id for q in questions} == {"a"}
    assert rejected.total() == 1


def test_a_prompt_has_to_fit_the_draft_that_answers_it(phi3):
    prompts = [Prompt(str(i), (1,) * 30, "", max_new_tokens=25) for i in range(20)]
    questions, rejected = asked(phi3, *prompts, writer={"target": 0.5, "draft": 0.5}, temperatures=(1.0,))
    assert {q.writer for q in questions} == {"target"}
    assert rejected == {"with its answer longer than the 50 positions of draft": 20 - len(questions)}


def test_what_a_template_refuses_is_rejected_and_plain_prompts_are_refused_whatever_is_drawn(phi3, refusing):
    messages = ({"role": "user", "content": "Hello"},)
    prompts = [Prompt(str(i), (1,), "", messages=messages, max_new_tokens=8) for i in range(20)]
    questions, rejected = asked(refusing, *prompts, system_prompts=("Be brief.", ""), temperatures=(1.0,))
    assert 0 < len(questions) < 20
    assert rejected == {"the chat template does not take the conversation: no system": 20 - len(questions)}
    for number in range(5):
        with pytest.raises(ConfigError, match="Magpie takes a system prompt as system="):
            asked(phi3, Prompt(str(number), (1,), ""), system_prompts=("Be brief.", ""), max_new_tokens=8)


def test_turns_that_cannot_be_labels_are_rejected_before_anything_is_answered(phi3):
    said = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    prompts = [Prompt(str(i), (1,), "", messages=said[i:], max_new_tokens=8) for i in (0, 2)]
    questions, rejected = asked(phi3, *prompts, labels="assistant", temperatures=(1.0,))
    assert [question.id for question in questions] == ["2@1"]
    assert rejected == {"the chat template rewrites earlier turns when the conversation goes on": 1}


def test_a_system_prompt_goes_before_the_conversation(phi3):
    messages = ({"role": "user", "content": "Hello"},)
    prompt = Prompt("a", (1,), "", messages=messages)
    asked = with_system(phi3, prompt, "Be brief.")
    assert asked.text == "<|system|>\nBe brief.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\n"
    assert list(asked.tokens) == phi3.encode(asked.text, bos=False)
    assert with_system(phi3, asked, "Be long.") is asked
    assert with_system(phi3, prompt, "") is prompt
    with pytest.raises(ConfigError, match="prompt b: system_prompts need prompts given as messages"):
        with_system(phi3, Prompt("b", (1,), "text"), "Be brief.")


def lines(tokenizer, *texts, finish="eos"):
    """As a model writes them after the bare beginning of a turn; special tokens are spelled out."""
    prompt = user_turn(tokenizer).tokens
    ends = [tokenizer.eos_id] if finish == "eos" else []
    said = [tokenizer.encode(text, bos=False) + ends for text in texts]
    return [
        {"id": f"magpie:{i}@1", "prompt_tokens": list(prompt), "tokens": tokens, "finish": finish}
        | {"text": tokenizer.continuation(prompt, tokens)}
        for i, tokens in enumerate(said)
    ]


def test_instructions_a_model_wrote_are_asked_once_and_whole(phi3):
    found = list(
        written(
            Written("made", max_tokens=40),
            [
                *lines(phi3, "Name a fish. ", "name a  FISH.", "", "Go <|user|> on", "word " * 60, "Name a bird."),
                *lines(phi3, "Cut off in the mid", finish="length"),
                {"id": "lost", "error": "empty answer"},
            ],
            phi3,
        )
    )
    quarantine = Quarantine()
    prompts = list(quarantine.accepted(found))
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["Name a fish.", "Name a bird."]
    assert prompts[0].text == "<|user|>\nName a fish.<|end|>\n<|assistant|>\n"
    assert quarantine.counts == {
        "duplicate": 1,
        "empty": 1,
        "holds tokens of the chat template": 1,
        "more than 40 tokens": 1,
        "did not end": 1,
        "was not written": 1,
    }
    assert found[1] == Rejected("made: magpie:1@1", "duplicate")
    assert len(list(written(Written("made", limit=1), lines(phi3, "a b", "c d"), phi3))) == 1


def test_a_turn_that_no_end_token_closes_ends_where_the_template_closes_it(llama2):
    (prompt,) = written(Written("made"), lines(llama2, "Name a fish. [/INST] A carp.", finish="length"), llama2)
    assert prompt.text == "<s>[INST] Name a fish. [/INST]"


def test_a_templates_own_tokens_are_seen_though_the_lines_text_leaves_them_out(phi3):
    """`<|end|>` closes a turn whether or not the model's configuration names it among its end tokens."""
    on = "Name a fish.<|end|><|assistant|> A carp."
    made = [*lines(phi3, on, "Name<|system|> a bird."), *lines(phi3, "Name a tree.<|end|> An", finish="length")]
    assert [line["text"].split() for line in made][:2] == [["Name", "a", "fish.", "A", "carp."], ["Name", "a", "bird."]]
    found = list(written(Written("made"), made, phi3))
    assert [item.messages[0]["content"] for item in (found[0], found[2])] == ["Name a fish.", "Name a tree."]
    assert found[1].reason == "holds tokens of the chat template"


def test_magpie_asks_with_the_bare_beginning_of_a_turn(phi3, llama2):
    first, second = Magpie(2).prompts(phi3)
    assert (first.id, second.id, first.text, first.tokens) == ("magpie:0", "magpie:1", "<|user|>\n", second.tokens)
    (steered,) = Magpie(1, system="You teach mathematics.").prompts(phi3)
    assert steered.text == "<|system|>\nYou teach mathematics.<|end|>\n<|user|>\n"
    (prompt,) = Magpie(1).prompts(llama2)
    assert llama2.decode(prompt.tokens, skip_special=False).rstrip() == "<s> [INST]"
    with pytest.raises(ConfigError, match="at 0 Magpie writes one instruction"):
        Generate("made", prompts=(Magpie(3),), length=64)


def test_instructions_of_several_systems_and_stages_are_told_apart(phi3):
    steered = (Magpie(2), Magpie(2, system="You teach mathematics.", name="mathematics"))
    questions = [asked(phi3, *source.prompts(phi3), temperatures=(1.0,), max_new_tokens=8)[0] for source in steered]
    ids = [question.id for found in questions for question in found]
    assert ids == ["magpie:0@1", "magpie:1@1", "mathematics:0@1", "mathematics:1@1"]
    prompts = [prompt for made in ("a", "b") for prompt in written(Written(made), lines(phi3, "Name a fish."), phi3)]
    assert [prompt.id for prompt in prompts] == ["a:magpie:0@1", "b:magpie:0@1"]
    with pytest.raises(ConfigError, match="each Magpie a name="):
        asked(phi3, *[prompt for _ in range(2) for prompt in Magpie(2).prompts(phi3)], max_new_tokens=8)


@pytest.mark.parametrize(
    "temperatures", [(), (-1.0,), (float("nan"),), (float("inf"),), (0.3, 0.3), (0.3, 0.3000000001)]
)
def test_temperatures_are_numbers_that_differ(temperatures):
    with pytest.raises(ConfigError, match="temperatures is"):
        Generate("made", prompts=(), length=64, temperatures=temperatures)
