"""`ask` against real servers; what a network or a gateway does to their answers is done by a proxy before them."""

import dataclasses
import itertools
import shutil
import threading
import time

import jax.numpy as jnp
import pytest

from jaxdraft.data.prompts import Prompt, read_prompt
from jaxdraft.decode import generate
from jaxdraft.errors import ConfigError
from jaxdraft.models import Decoder, for_decoding
from jaxdraft.models.hf import load_model
from jaxdraft.server import Question, Server, ask
from jaxdraft.settings import to_json
from jaxdraft.tokenizers import load_tokenizer
from tests.server.proxy import Broken, Proxy

EOS_IDS = (1, 2)  # of stories260K
LIMIT = 20
MID_WORD = 11  # the prompt that ends in a word; the one after it begins a story
WHOLE_STORY = 200  # tokens within which that ends
KEY = "JAXDRAFT_TEST_KEY"


@pytest.fixture(scope="module")
def prompts(shared_data, tokenizer) -> list[Prompt]:
    """Beginnings of paragraphs, every second one said by a user, then of a word and of a story."""
    paragraphs = (shared_data / "corpora" / "tinystories_head.txt").read_text("utf-8").split("\n\n")
    found = []
    for i, paragraph in enumerate(paragraphs[:MID_WORD]):
        words = " ".join(paragraph.split()[: 3 + i])
        row = {"messages": [{"role": "user", "content": words}]} if i % 2 else {"prompt": words}
        found.append(read_prompt(row, i, tokenizer, "here"))
    rest = "Lily wanted to p", "One day, a girl named Sue"
    return [*found, *(read_prompt({"prompt": text}, text, tokenizer, "here") for text in rest)]


@pytest.fixture(scope="module")
def ours(served, prompts):
    """What our own decoder writes, greedily."""
    config, params = load_model(served)
    assert config.eos_ids == EOS_IDS
    return generate(
        Decoder(config, scan=False, dtype=jnp.float32),
        for_decoding(config, params, jnp.float32),
        [prompt.tokens for prompt in prompts],
        max_new_tokens=[*[LIMIT] * (len(prompts) - 1), WHOLE_STORY],
        batch_size=13,
    )


def asked(prompts, max_new_tokens=LIMIT, **settings) -> list[Question]:
    settings = {"temperature": 0.0, "top_p": 1.0} | settings
    return [Question(i, prompt, max_new_tokens=max_new_tokens, seed=i, **settings) for i, prompt in enumerate(prompts)]


def answers(server: Server, questions, tokenizer) -> dict:
    """By key; each came once."""
    replies = list(ask(server, questions, tokenizer, EOS_IDS))
    assert sorted(reply.key for reply in replies) == [question.key for question in questions]
    return {reply.key: reply for reply in replies}


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"url": "localhost:8000/v1"}, "give it as http://localhost:8000/v1"),
        ({"url": "file:///v1"}, "give it as"),
        ({"url": "http://localhost/v1?key=x"}, "give it as"),
        ({"url": "https://me:hunter2@host/v1"}, "user name or password.*environment variable"),
        ({"concurrency": 0}, "must be positive"),
        ({"retries": -1}, "at least 0"),
        ({"timeout": 0}, "must be positive"),
        ({"extra": {"seed": 1}}, "extra holds 'seed'"),
    ],
)
def test_a_server_is_checked_when_it_is_named(settings, words):
    with pytest.raises(ConfigError, match=words) as error:
        Server(**{"url": "http://localhost:8000/v1"} | settings)
    assert "hunter2" not in str(error.value)


def test_no_questions_need_no_server(tokenizer):
    assert list(ask(Server("http://127.0.0.1:9/v1"), [], tokenizer, EOS_IDS)) == []


def test_llama_cpp_writes_what_our_decoder_writes(llama_cpp, tokenizer, prompts, ours):
    *short, story = asked(prompts)
    questions = [*short, story._replace(max_new_tokens=WHOLE_STORY)]
    found = answers(Server(llama_cpp.url, concurrency=5), questions, tokenizer)
    assert [list(found[i].tokens) for i in range(len(prompts))] == ours
    texts = [tokenizer.continuation(prompt.tokens, tokens) for prompt, tokens in zip(prompts, ours, strict=True)]
    assert [found[i].text for i in range(len(prompts))] == texts
    assert [found[i].finish for i in range(len(prompts))] == ["length"] * len(short) + ["eos"]


def test_transformers_writes_what_our_decoder_writes(transformers_serve, tokenizer, prompts, ours):
    *short, story = asked(prompts)
    with Proxy(transformers_serve.url) as proxy:
        found = answers(Server(proxy.url), [*short, story._replace(max_new_tokens=WHOLE_STORY)], tokenizer)
    # Its text lacks a first space: where the ids then cannot be told, in the middle of a word or of a line, none are.
    untold = "the server reports no token ids, and the answer's text does not tell them"
    assert {reply.error for reply in found.values()} == {None, untold}
    assert found[MID_WORD].error == untold
    for i, (prompt, tokens) in enumerate(zip(prompts, ours, strict=True)):
        if found[i].error:
            assert prompt.messages is None
        elif tokens[-1] in EOS_IDS:  # which of them, a text does not tell
            assert list(found[i].tokens) == [*tokens[:-1], tokenizer.eos_id]
        else:
            assert list(found[i].tokens) == tokens
    paths = ["/v1/chat/completions" if prompt.messages else "/v1/completions" for prompt in prompts]
    assert sorted(request.path for request in proxy.requests[2:]) == sorted(paths)


def test_a_template_that_is_not_the_servers_is_found_out(transformers_serve, served, tmp_path):
    shutil.copytree(served, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ bos_token }}User: {{ messages[0].content }}\n")
    other = load_tokenizer(tmp_path / "other")
    prompt = read_prompt({"messages": [{"role": "user", "content": "One day"}]}, 0, other, "here")
    (reply,) = ask(Server(transformers_serve.url), asked([prompt]), other, EOS_IDS)
    assert reply.error == "the server makes other tokens of the prompt than the target's tokenizer"


def test_settings_reach_the_server_with_each_question(llama_cpp, tokenizer, prompts):
    with Proxy(llama_cpp.url) as proxy:
        server = Server(proxy.url, extra={"min_p": 0.1})
        questions = asked(prompts[:3], max_new_tokens=5, temperature=0.7, top_p=0.95)
        assert all(len(reply.tokens) <= 5 for reply in answers(server, questions, tokenizer).values())
        again = answers(server, questions, tokenizer)
        assert again == answers(dataclasses.replace(server, concurrency=1), questions, tokenizer)
    models, probe, *rest = proxy.requests[:5]
    assert (models.path, probe.path, probe.body["max_tokens"]) == ("/v1/models", "/v1/completions", 1)
    assert {tuple(request.body["prompt"]) for request in rest} == {prompt.tokens for prompt in prompts[:3]}
    for request in rest:
        body = request.body
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.95, 5)
        assert (body["top_k"], body["min_p"]) == (-1, 0.1)
    assert sorted(request.body["seed"] for request in rest) == [0, 1, 2]


def test_questions_are_pulled_as_requests_become_free(llama_cpp, tokenizer, prompts):
    pulled = []
    questions = (pulled.append(question.key) or question for question in asked(prompts, max_new_tokens=4))
    with Proxy(llama_cpp.url) as proxy:
        for count, _ in enumerate(ask(Server(proxy.url, concurrency=3), questions, tokenizer, EOS_IDS), start=1):
            assert len(pulled) <= count + 2
    assert pulled == list(range(len(prompts)))
    assert 1 < proxy.most <= 3


@pytest.mark.parametrize(
    "fault",
    [
        Broken(500, body={"error": {"message": "out of memory"}}),
        Broken(503),
        Broken(429, {"retry-after": "2"}),
        Broken(),
        Broken(hangs=True),
    ],
    ids=["500", "503", "429", "dropped", "hangs"],
)
def test_a_fault_that_passes_changes_nothing(fault, llama_cpp, tokenizer, prompts):
    few = asked(prompts[:6])
    expected = answers(Server(llama_cpp.url), few, tokenizer)
    with Proxy(llama_cpp.url, lambda request, number: fault if number in (2, 4, 5) else None) as proxy:
        started = time.monotonic()
        server = Server(proxy.url, timeout=3.0 if fault.hangs else 60.0, concurrency=4)
        assert answers(server, few, tokenizer) == expected
    assert len(proxy.requests) == 2 + len(few) + 3
    assert fault.status != 429 or time.monotonic() - started >= 2


def test_a_server_that_is_killed_and_comes_back_loses_no_answer(start_llama_cpp, tokenizer, prompts):
    process = start_llama_cpp()
    few = asked(prompts)
    expected = answers(Server(process.url), few, tokenizer)
    replies = ask(Server(process.url, concurrency=4), few, tokenizer, EOS_IDS)
    found = list(itertools.islice(replies, 3))
    process.kill()
    again = threading.Thread(target=process.start)
    again.start()
    found += replies
    again.join()
    assert len(found) == len(few)
    assert {reply.key: reply for reply in found} == expected


def test_a_server_that_stays_away_is_named(start_llama_cpp, tokenizer, prompts):
    process = start_llama_cpp()
    replies = ask(Server(process.url, concurrency=2, retries=1), asked(prompts), tokenizer, EOS_IDS)
    assert next(replies).error is None
    process.kill()
    with pytest.raises(OSError, match=rf"{process.url}: no answer in 2 tries, .*(refused|disconnected).*run the same"):
        list(replies)


def test_a_server_that_keeps_failing_is_quoted(llama_cpp, tokenizer, prompts):
    broken = Broken(500, body={"error": {"message": "CUDA error"}})
    with Proxy(llama_cpp.url, lambda request, number: broken if number > 6 else None) as proxy:
        replies = ask(Server(proxy.url, concurrency=1, retries=1), asked(prompts), tokenizer, EOS_IDS)
        assert len(list(itertools.islice(replies, 5))) == 5
        with pytest.raises(OSError, match="no answer in 2 tries, the last time 500: CUDA error"):
            next(replies)
        assert list(replies) == []


def test_leaving_does_not_wait_for_a_server_that_hangs(llama_cpp, tokenizer, prompts):
    with Proxy(llama_cpp.url, lambda request, number: Broken(hangs=True) if number > 2 else None) as proxy:
        replies = ask(Server(proxy.url, concurrency=3), asked(prompts), tokenizer, EOS_IDS)
        next(replies)
        started = time.monotonic()
        replies.close()
        assert time.monotonic() - started < 1


def test_one_question_that_is_refused_leaves_the_others(llama_cpp, tokenizer, prompts):
    long = read_prompt({"prompt": "One day " * 400}, 0, tokenizer, "here")
    found = answers(Server(llama_cpp.url), asked([prompts[0], long, prompts[1]]), tokenizer)
    assert found[1].error.startswith("the server refuses it: request (N tokens) exceeds")
    assert found[1].tokens == ()
    assert found[0].error is found[2].error is None


def test_an_answer_of_an_end_token_alone_is_none(llama_cpp, tokenizer, prompts):
    server = Server(llama_cpp.url, extra={"logit_bias": {"2": 100}})
    assert {reply.error for reply in answers(server, asked(prompts[:3]), tokenizer).values()} == {"empty answer"}


def test_a_key_is_read_from_the_environment_and_never_shown(start_llama_cpp, tokenizer, prompts, monkeypatch):
    server = Server(start_llama_cpp("the-right-key").url, key_variable=KEY, model="stories260K")
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ConfigError, match=f"401: .*environment variable {KEY} is not set"):
        list(ask(server, asked(prompts[:1]), tokenizer, EOS_IDS))
    monkeypatch.setenv(KEY, "a-wrong-key")
    with pytest.raises(ConfigError, match=f"401: .*environment variable {KEY} is sent") as error:
        list(ask(server, asked(prompts[:1]), tokenizer, EOS_IDS))
    assert "a-wrong-key" not in str(error.value)
    monkeypatch.setenv(KEY, "the-right-key\n")
    assert answers(server, asked(prompts[:2]), tokenizer)[1].error is None
    assert "the-right-key" not in repr(server)


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_repeats_the_key_is_not_quoted_with_it(status, llama_cpp, tokenizer, prompts, monkeypatch):
    monkeypatch.setenv(KEY, "sk-12345")
    fault = Broken(status, body={"error": {"message": "Incorrect API key provided: sk-12345."}})
    with Proxy(llama_cpp.url, lambda request, number: fault) as proxy:
        with pytest.raises((ConfigError, OSError), match="provided: \\(key\\)") as error:
            list(ask(Server(proxy.url, key_variable=KEY, retries=0), asked(prompts[:1]), tokenizer, EOS_IDS))
    assert "sk-12345" not in str(error.value)


def test_a_key_does_not_follow_a_redirect(llama_cpp, tokenizer, prompts, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    with Proxy(llama_cpp.url) as other:
        moved = Broken(307, {"location": f"{other.url}/completions"})
        with Proxy(llama_cpp.url, lambda request, number: moved) as proxy:
            with pytest.raises(ConfigError, match=f"307: .*redirects to {other.url}/completions"):
                list(ask(Server(proxy.url, key_variable=KEY), asked(prompts[:1]), tokenizer, EOS_IDS))
    assert proxy.requests[0].headers["Authorization"] == "Bearer secret"
    assert other.requests == []


def test_a_wrong_address_is_told_at_once(llama_cpp, tokenizer, prompts):
    wrong = llama_cpp.url.replace("/v1", "/v7")
    with pytest.raises(ConfigError, match=f"{wrong}/models: 404: .*most end in /v1"):
        list(ask(Server(wrong), asked(prompts[:1]), tokenizer, EOS_IDS))


@pytest.mark.parametrize(
    "body, words",
    [
        ({"data": [{"id": "large"}, {"id": "small"}]}, "serves large, small: name one with model="),
        ({"data": []}, "serves no model"),
        ({"hello": "world"}, "not what an OpenAI-compatible server answers.*hello"),
    ],
)
def test_a_list_of_models_that_names_not_one(body, words, llama_cpp, tokenizer, prompts):
    with Proxy(llama_cpp.url, lambda request, number: Broken(200, body=body)) as proxy:
        with pytest.raises(ConfigError, match=words):
            list(ask(Server(proxy.url), asked(prompts[:1]), tokenizer, EOS_IDS))


@pytest.mark.parametrize("wrong", [[512], [5, -1], ["5"], [5.0]])
def test_ids_that_the_tokenizer_does_not_have_are_no_answer(wrong, tokenizer, prompts):
    """Written down, they would stop the stage when its rows are packed, hours later."""
    choice = {"text": "x", "finish_reason": "length", "token_ids": wrong}
    reply = lambda request, _: Broken(
        200, body={"choices": [choice], "usage": {"prompt_tokens": len(request.body["prompt"])}}
    )
    with Proxy("http://127.0.0.1:9/v1", reply) as proxy:
        (found,) = ask(Server(proxy.url, model="served"), asked(prompts[:1]), tokenizer, EOS_IDS)
    assert found.error == "the server writes token ids that the target's tokenizer does not have"


def test_how_a_server_is_asked_changes_no_stage():
    """A run that stopped for a server that is too busy goes on with fewer requests at once."""
    url = "http://localhost:8000/v1"
    patient = Server(url, concurrency=2, retries=9, timeout=60.0, key_variable=KEY)
    assert to_json(patient) == to_json(Server(url)) != to_json(Server(url, model="other"))
