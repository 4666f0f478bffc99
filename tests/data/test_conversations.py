"""Loss masks and user turns against transformers' own mask, in the formats of Llama 2, Llama 3, ChatML and Phi-3."""

import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxdraft.data.conversations import Conversation, ConversationFile, labelled, prompt_mask, user_turn
from jaxdraft.errors import ConfigError
from jaxdraft.tokenizers import ChatTemplateError, Tokenizer, load_tokenizer

# What the model cards document, with transformers' mark around what the assistant writes: the oracle of these tests.
LLAMA_2 = """
{%- set system = messages[0].content if messages[0].role == 'system' else none -%}
{%- for m in (messages if system is none else messages[1:]) -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('user and assistant have to take turns') }}
    {%- elif m.role == 'user' -%}
        {{ bos_token + '[INST] ' }}
        {{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system is not none }}
        {{- (m.content | trim) + ' [/INST]' }}
    {%- else -%}
        {%- generation -%}{{ ' ' + (m.content | trim) + ' ' + eos_token }}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
"""
LLAMA_3 = """
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ (m.content | trim) + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- (m.content | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}
"""
CHATML = """
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- m.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}
"""
PHI_3_ANSWER = (
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"  # in the template that came with the tokenizer
)
PHI_3_MARKED = "{{'<|assistant|>\n'}}{% generation %}{{message['content'] + '<|end|>'}}{% endgeneration %}{{'\n'}}"


class Chat(NamedTuple):
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    marked: str  # the template with transformers' mark


def with_template(source: Path, folder: Path, template: str, renamed: dict[str, str] | None = None) -> Tokenizer:
    """A copy of a tokenizer with a chat template, and with added tokens by other names."""
    shutil.copytree(source, folder)
    folder.chmod(0o755)
    text = (folder / "tokenizer.json").read_text("utf-8")
    for old, new in (renamed or {}).items():
        text = text.replace(json.dumps(old), json.dumps(new))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(text, "utf-8")
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def chats(shared_data, tmp_path_factory) -> dict[str, Chat]:
    real, folder = shared_data / "tokenizers", tmp_path_factory.mktemp("chats")
    renamed = {"<|reserved_special_token_0|>": "<|im_start|>", "<|reserved_special_token_1|>": "<|im_end|>"}
    phi = load_tokenizer(real / "phi3-mini")
    config = json.loads((real / "phi3-mini" / "tokenizer_config.json").read_text())
    assert PHI_3_ANSWER in config["chat_template"]
    found = {
        "llama-2": (with_template(real / "llama2", folder / "llama-2", LLAMA_2), "</s>", LLAMA_2),
        "llama-3": (with_template(real / "llama3", folder / "llama-3", LLAMA_3), "<|eot_id|>", LLAMA_3),
        "chatml": (with_template(real / "llama3", folder / "chatml", CHATML, renamed), "<|im_end|>", CHATML),
        "phi-3": (phi, "<|end|>", config["chat_template"].replace(PHI_3_ANSWER, PHI_3_MARKED)),
    }
    return {
        name: Chat(tokenizer, frozenset({*tokenizer.encode(end, bos=False)[-1:], tokenizer.eos_id}), marked)
        for name, (tokenizer, end, marked) in found.items()
    }


@pytest.fixture(scope="module", params=["llama-2", "llama-3", "chatml", "phi-3"])
def chat(request, chats) -> Chat:
    return chats[request.param]


@pytest.fixture(scope="module")
def conversations(shared_data) -> list[list[dict[str, str]]]:
    """Real ones of two to six turns, every fourth with a system prompt."""

    def threads(message, before):
        role = {"prompter": "user", "assistant": "assistant"}[message["role"]]
        before = [*before, {"role": role, "content": message["text"]}]
        if role == "assistant" and len(before) > 1:
            yield before
        for reply in message["replies"]:
            yield from threads(reply, before)

    lines = (shared_data / "prompts" / "oasst_en_100_tree.jsonl").read_text("utf-8").splitlines()[:40]
    found = [max(threads(json.loads(line)["prompt"], []), key=len, default=None) for line in lines]
    system = {"role": "system", "content": "Answer in one sentence."}
    return [[system, *thread] if i % 4 == 0 else thread for i, thread in enumerate(found) if thread]


def spans(tokens, mask) -> list[list[int]]:
    return [
        [t for t, _ in group]
        for label, group in itertools.groupby(zip(tokens, mask, strict=True), lambda x: x[1])
        if label
    ]


def test_what_the_assistant_wrote_is_what_its_turns_say(chat, conversations):
    tokenizer, eos_ids, _ = chat
    assert max(map(len, conversations)) >= 6
    for messages in conversations:
        tokens, mask = labelled(tokenizer, messages, eos_ids=eos_ids)
        assert tokens == tokenizer.encode(tokenizer.render(messages, reply=False), bos=False)
        written = spans(tokens, mask)
        said = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        assert [tokenizer.decode(span).strip() for span in written] == said
        assert all(span[-1] in eos_ids and eos_ids.isdisjoint(span[:-1]) for span in written)


def test_a_prompt_ends_where_an_answer_begins(chat, conversations):
    tokenizer, eos_ids, _ = chat
    for messages in conversations:
        tokens, mask = labelled(tokenizer, messages, eos_ids=eos_ids)
        *before, last = messages
        prompt = tokenizer.encode(tokenizer.render(before), bos=False)
        earlier = prompt_mask(tokenizer, before, eos_ids=eos_ids)
        assert tokens[: len(prompt)] == prompt
        assert mask[: len(prompt)] == earlier
        assert len(spans(prompt, earlier)) == sum(m["role"] == "assistant" for m in before)
        assert mask[len(prompt)] == 1
        assert spans(tokens, mask)[-1] == tokens[len(prompt) :][: sum(mask) - sum(earlier)]
        assert last["role"] == "assistant"


def test_tokens_and_mask_are_those_of_transformers(chat, conversations):
    transformers = pytest.importorskip("transformers")
    tokenizer, eos_ids, marked = chat
    # Not AutoTokenizer: transformers 5 puts other rules in the place of those in Phi-3's tokenizer.json.
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer.folder)
    for messages in conversations:
        found = theirs.apply_chat_template(
            messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        assert labelled(tokenizer, messages, eos_ids=eos_ids) == (found["input_ids"], found["assistant_masks"])


def test_sentencepiece_alone_gives_the_same(chats, conversations, tmp_path):
    fast, eos_ids, _ = chats["llama-2"]
    slow = tmp_path / "slow"
    shutil.copytree(fast.folder, slow, ignore=shutil.ignore_patterns("tokenizer.json"))
    for messages in conversations[:8]:
        expected = labelled(fast, messages, eos_ids=eos_ids)
        assert labelled(load_tokenizer(slow), messages, eos_ids=eos_ids) == expected


def test_everything_is_a_label_but_the_first(chat, conversations):
    tokens, mask = labelled(chat.tokenizer, conversations[0], "all", eos_ids=chat.eos_ids)
    assert mask == [0] + [1] * (len(tokens) - 1)


def test_what_a_template_refuses_says_why(chats):
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    llama2, chatml = chats["llama-2"], chats["chatml"]
    with pytest.raises(ChatTemplateError, match="user and assistant have to take turns"):
        labelled(llama2.tokenizer, [user, user, assistant], eos_ids=llama2.eos_ids)
    with pytest.raises(ChatTemplateError, match="the assistant speaks first"):
        labelled(chatml.tokenizer, [assistant, user], eos_ids=chatml.eos_ids)
    with pytest.raises(ChatTemplateError, match="the assistant says nothing"):
        labelled(chatml.tokenizer, [user], eos_ids=chatml.eos_ids)
    with pytest.raises(ChatTemplateError, match="no messages"):
        labelled(chatml.tokenizer, [], eos_ids=chatml.eos_ids)
    with pytest.raises(ChatTemplateError, match=r"no end token \(7\)"):
        labelled(chatml.tokenizer, [user, assistant], eos_ids=[7])


@pytest.mark.parametrize(
    "written, reason",
    [
        ("m.content.split('</think>')[-1] if not loop.last else m.content", "rewrites earlier turns"),
        ("m.content.split('</think>')[-1]", "changes the assistant's words"),
        ("'<think>' + m.content", None),
    ],
)
def test_reasoning_that_a_template_strips(shared_data, tmp_path, written, reason):
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ':' }}"
        "{{ (" + written + ") + eos_token if m.role == 'assistant' else m.content + '\n' }}{% endfor %}"
        "{{ 'assistant:' if add_generation_prompt }}"
    )
    tokenizer = with_template(shared_data / "tokenizers" / "llama2", tmp_path / "t", template)
    ask, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>hm</think>Hello"}
    messages = [ask, answer, ask, {"role": "assistant", "content": "Bye"}]
    if reason is None:
        tokens, mask = labelled(tokenizer, messages, eos_ids={tokenizer.eos_id})
        assert [tokenizer.decode(s) for s in spans(tokens, mask)] == ["<think><think>hm</think>Hello", "<think>Bye"]
        return
    with pytest.raises(ChatTemplateError, match=reason):
        labelled(tokenizer, messages, eos_ids={tokenizer.eos_id})


def test_a_reply_opened_with_what_history_lacks_is_refused(shared_data, tmp_path):
    template = "{{ messages[0].content }}{{ '<think>' if add_generation_prompt else messages[1].content + eos_token }}"
    tokenizer = with_template(shared_data / "tokenizers" / "llama2", tmp_path / "t", template)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(ChatTemplateError, match="opens a reply otherwise"):
        labelled(tokenizer, messages, eos_ids={tokenizer.eos_id})


PREFIXES = {
    "llama-2": ("<s>[INST] ", " [/INST]"),
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "phi-3": ("<|user|>\n", "<|end|>\n<|assistant|>\n"),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_a_user_turn_is_what_stands_around_the_words(chats, name):
    tokenizer = chats[name].tokenizer
    turn = user_turn(tokenizer)
    assert (turn.prefix, turn.suffix) == PREFIXES[name]
    for words in ("Why is it so?", "why", "2 + 2 = ?", "(a)", "Été"):
        tokens = tokenizer.encode(tokenizer.render([{"role": "user", "content": words}]), bos=False)
        assert tuple(tokens[: len(turn.tokens)]) == turn.tokens
        assert tokenizer.continuation(turn.tokens, tokens[len(turn.tokens) :]).lstrip().startswith(words)
    assert "Be brief." in user_turn(tokenizer, system="Be brief.").prefix


def test_a_user_turn_needs_the_words_as_they_are(shared_data, tmp_path):
    source = shared_data / "tokenizers" / "llama2"
    shouting = with_template(source, tmp_path / "a", "{{ messages[0].content | upper }}")
    with pytest.raises(ChatTemplateError, match="the user's words"):
        user_turn(shouting)
    refusing = with_template(
        source,
        tmp_path / "b",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
    )
    with pytest.raises(ChatTemplateError, match="no system role"):
        user_turn(refusing, system="Be brief.")
    with pytest.raises(ConfigError, match="no chat template"):
        user_turn(load_tokenizer(source))


def test_conversations_from_a_file(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    lines = [{"id": "a", "messages": turns}, {"messages": turns}, {"messages": [{"role": "user"}]}, {"prompt": "hi"}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    found = list(ConversationFile(str(path)).conversations())
    assert found[:2] == [Conversation("a", tuple(turns)), Conversation("2", tuple(turns))]
    assert [row.where.split(" (")[0] for row in found[2:]] == [f"{path}: line {n}" for n in (3, 4, 5)]
    assert len(list(ConversationFile(str(path), limit=1).conversations())) == 1
    with pytest.raises(ConfigError, match="no such file of conversations"):
        ConversationFile("nowhere.jsonl").fingerprint()
