import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece

from jaxdraft.data.prompts import PromptFile
from jaxdraft.errors import ConfigError
from jaxdraft.evaluate import command
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tokenizers import differences, load_tokenizer, single_threaded, tokenizer_files

GOLDEN = {"llama2": "llama-spm", "llama3": "llama-bpe", "phi3-mini": "phi-3"}
AWKWARD = [
    "def f(x):\n    if x:\n\treturn  {'a': 1}\n\n\n",
    "  leading, trailing  ",
    "\r\nWindows\r\n",
    "naïve café 漢字 😀 \x7f\x00 end",
    " ",
    "\n" * 7 + " " * 37 + "x",
    "",
]


@pytest.fixture(scope="session")
def sources() -> list[str]:
    """A few hundred kB of Python."""
    files = sorted(Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py"))
    return [path.read_text("utf-8") for path in files]


@pytest.fixture(scope="session")
def trained(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(sources, folder, 1024)
    return folder


def golden(shared_data: Path, name: str) -> list[tuple[str, list[int]]]:
    folder = shared_data / "tokenizers" / "golden"
    texts = (folder / f"{name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [[int(i) for i in line.split()] for line in (folder / f"{name}.out").read_text().split("\n")]
    return list(zip(texts, ids, strict=True))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids(shared_data, name):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    for text, ids in golden(shared_data, GOLDEN[name]):
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.encode(text) == ([tokenizer.bos_id, *ids] if tokenizer.adds_bos else ids)
        assert "".join(tokenizer.fragments(ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "name, bos, eos, adds_bos, size",
    [
        ("llama2", 1, 2, True, 32000),
        ("llama3", 128000, 128001, True, 128256),
        ("phi3-mini", 1, 32000, False, 32011),
    ],
)
def test_special_ids(shared_data, name, bos, eos, adds_bos, size):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    found = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos, tokenizer.vocab_size)
    assert found == (bos, eos, adds_bos, size)
    assert tokenizer.pieces().index(tokenizer.pieces()[eos]) == eos


def test_sentencepiece_alone_equals_tokenizer_json(shared_data, tmp_path):
    both = load_tokenizer(shared_data / "tokenizers" / "llama2")
    (tmp_path / "tokenizer.model").write_bytes((both.folder / "tokenizer.model").read_bytes())
    alone = load_tokenizer(tmp_path)
    assert alone.fingerprint() == both.fingerprint()
    for text, ids in golden(shared_data, "llama-spm"):
        assert alone.encode(text) == [1, *ids]
        assert alone.decode(ids) == both.decode(ids)
    assert alone.encode("a</s>b") == both.encode("a</s>b") == [1, 263, 2, 289]
    assert "</s>" in alone.decode([263, 2, 289], skip_special=False)


def test_sentencepiece_with_added_tokens_equals_tokenizer_json(shared_data, tmp_path):
    """Phi-3's tokenizer.model is Llama-2's; its own tokens stand in tokenizer_config.json."""
    both = load_tokenizer(shared_data / "tokenizers" / "phi3-mini")
    (tmp_path / "tokenizer.model").write_bytes((shared_data / "tokenizers/llama2/tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes((both.folder / "tokenizer_config.json").read_bytes())
    alone = load_tokenizer(tmp_path)
    assert (alone.bos_id, alone.eos_id, alone.adds_bos) == (both.bos_id, both.eos_id, both.adds_bos)
    assert [i for i, (a, b) in enumerate(zip(alone.pieces(), both.pieces(), strict=True)) if a != b] == []
    for text, ids in golden(shared_data, "phi-3"):
        assert alone.encode(text) == ids
    chat = "<|user|>\nHow are you?<|end|>\n<|assistant|>"
    for text in (chat, " a<|end|> b", "a</s>b", "a</s>  b <unk>c", "<|end|>", "x<|endoftext|> y", "<s><s> <|user|>"):
        ids = both.encode(text)
        assert alone.encode(text) == ids
        for skip_special in (True, False):
            assert alone.decode(ids, skip_special) == both.decode(ids, skip_special)
    assert alone.decode([263, 32050]) == both.decode([263, 32050]) == "a"
    assert differences(both, alone) == []


def sentencepiece_folder(shared_data: Path, folder: Path, added: dict, **files: dict) -> Path:
    """Llama-2's tokenizer.model with added tokens in tokenizer_config.json, and other files by their stems."""
    (folder / "tokenizer.model").write_bytes((shared_data / "tokenizers/llama2/tokenizer.model").read_bytes())
    for stem, content in {"tokenizer_config": {"added_tokens_decoder": added}, **files}.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def test_added_tokens_take_the_longest_and_leave_gaps(shared_data, tmp_path):
    added = {
        "32001": {"content": "<x>", "special": True},
        "32003": {"content": "<x><y>", "lstrip": True, "special": False},
        "32004": {"content": "\n\n", "special": False},
    }
    more = {"<z>": 32005, "<end>": 32006}
    names = {"additional_special_tokens": ["<end>"]}
    folder = sentencepiece_folder(shared_data, tmp_path, added, added_tokens=more, special_tokens_map=names)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pieces()[32000:] == ["", "<x>", "", "<x><y>", "\n\n", "<z>", "<end>"]
    ids = tokenizer.encode("a \t<x><y><x>\n\n<z><end>", bos=False)
    assert ids == [263, 32003, 32001, 32004, 32005, 32006]
    assert tokenizer.decode(ids) == "a<x><y>\n\n<z>"
    assert tokenizer.decode(ids, skip_special=False) == "a<x><y><x>\n\n<z><end>"
    assert "".join(tokenizer.fragments(ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "added", [{"x": {"content": "<x>"}}, {"32000": "<x>"}, {"32000": {}}, {"-1": {"content": "a"}}]
)
def test_added_tokens_that_make_no_sense_are_refused(shared_data, tmp_path, added):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_tokenizer(sentencepiece_folder(shared_data, tmp_path, added))


def test_differences_are_named_piece_by_piece(shared_data):
    llama2, phi3 = (load_tokenizer(shared_data / "tokenizers" / name) for name in ("llama2", "phi3-mini"))
    pieces, eos, add_bos = differences(llama2, phi3)
    assert pieces == (
        "id 32000 is missing in the target and '<|endoftext|>' in the draft, "
        "id 32001 is missing in the target and '<|assistant|>' in the draft, "
        "id 32002 is missing in the target and '<|placeholder1|>' in the draft; "
        "11 of 32011 pieces differ (the target has 32000, the draft 32011)"
    )
    assert eos == "EOS is 2 in the target and 32000 in the draft ('</s>' and '<|endoftext|>')"
    assert add_bos == "add_bos is True in the target and False in the draft"


def copy_of(folder: Path, to: Path) -> Path:
    for path in tokenizer_files(folder):
        (to / path.name).write_bytes(path.read_bytes())
    return to


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def swap_pieces(folder: Path) -> None:
    pieces = load_tokenizer(folder).pieces()
    swapped = {pieces[300]: 301, pieces[301]: 300}
    edit(folder / "tokenizer.json", lambda data: data["model"]["vocab"].update(swapped))


def other_bos(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda data: data.update(bos_token="<unk>"))


def other_eos(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda data: data.update(eos_token="<unk>"))


def no_add_bos(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda data: data.update(post_processor=None))


def test_evaluation_warns_of_another_add_bos(trained, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(command, "load_config", lambda folder: SimpleNamespace(vocabulary=1024))
    no_add_bos(copy_of(trained, tmp_path))
    sentence = "add_bos is True in the target and False in the draft"
    assert sentence in differences(load_tokenizer(trained), load_tokenizer(tmp_path))
    tokenizer = command.shared_tokenizer(trained, tmp_path)
    assert (tokenizer.folder, tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (trained, 1, 2, True)
    assert f"{sentence}; the target's tokenizer is used" in caplog.text


@pytest.mark.parametrize(
    "change, sentence",
    [
        (other_bos, "BOS is 1 in the target and 0 in the draft ('<s>' and '<unk>')"),
        (other_eos, "EOS is 2 in the target and 0 in the draft ('</s>' and '<unk>')"),
    ],
)
def test_evaluation_refuses_another_bos_or_eos(trained, tmp_path, monkeypatch, change, sentence):
    monkeypatch.setattr(command, "load_config", lambda folder: SimpleNamespace(vocabulary=1024))
    change(copy_of(trained, tmp_path))
    with pytest.raises(ConfigError, match=f"{re.escape(sentence)}: .* put the target's tokenizer files into"):
        command.shared_tokenizer(trained, tmp_path)


def test_evaluation_refuses_two_swapped_pieces(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_config", lambda folder: SimpleNamespace(vocabulary=1024))
    swap_pieces(copy_of(trained, tmp_path))
    a, b = load_tokenizer(trained).pieces()[300:302]
    [sentence] = differences(load_tokenizer(trained), load_tokenizer(tmp_path))
    assert sentence == (
        f"id 300 is {a!r} in the target and {b!r} in the draft, id 301 is {b!r} in the target and {a!r} in the draft; "
        "2 of 1024 pieces differ"
    )
    with pytest.raises(ConfigError, match=f"{re.escape(sentence)}. A draft works only for a target with its own"):
        command.shared_tokenizer(trained, tmp_path)


def test_files_of_a_qwen2_folder(tmp_path):
    names = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"]
    for name in [*names, "config.json", "model.safetensors"]:
        (tmp_path / name).touch()
    assert [path.name for path in tokenizer_files(tmp_path)] == names


def test_ids_named_only_in_config_json(shared_data, tmp_path):
    model = shared_data / "models" / "stories260K-hf"
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_trained_round_trip_is_exact(trained, sources):
    tokenizer = load_tokenizer(trained)
    for text in [*sources, *AWKWARD]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos, tokenizer.vocab_size) == (1, 2, True, 1024)
    assert tokenizer.encode("x")[0] == 1
    assert tokenizer.encode("x", bos=False)[0] != 1


def test_trained_json_gives_the_ids_of_the_model(trained, sources):
    tokenizer = load_tokenizer(trained)
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    texts = [*sources, *AWKWARD]
    assert tokenizer.encode_batch(texts, bos=False) == model.encode(texts)
    assert tokenizer.pieces() == [model.id_to_piece(i) for i in range(1024)]


def test_training_gives_the_same_bytes(sources, tmp_path):
    for name in ("a", "b"):
        train_sentencepiece(iter(sources), tmp_path / name, 512, max_chars=100_000)
    files = tokenizer_files(tmp_path / "a")
    assert [f.name for f in files] == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]
    assert all(f.read_bytes() == (tmp_path / "b" / f.name).read_bytes() for f in files)


def test_training_refuses_a_vocabulary_the_text_cannot_fill(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size=2000"):
        train_sentencepiece(["too little"], tmp_path, 2000)


def test_fragments_put_a_character_where_it_is_complete(trained):
    tokenizer = load_tokenizer(trained)
    ids = tokenizer.encode("é😀!")
    assert [f for f in tokenizer.fragments(ids) if f] == ["é", "😀", "!"]
    assert tokenizer.fragments([]) == []


def test_fingerprint_sees_two_swapped_pieces(trained, tmp_path):
    original = load_tokenizer(trained)
    assert load_tokenizer(copy_of(trained, tmp_path)).fingerprint() == original.fingerprint()
    swap_pieces(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() != original.fingerprint()


def test_errors_name_the_folder(tmp_path, trained):
    with pytest.raises(ConfigError, match=r"tokenizer\.json and tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(trained).render([{"role": "user", "content": "hi"}])


def test_import_is_light():
    heavy = "{'jax', 'torch', 'tensorflow', 'transformers', 'matplotlib'}"
    code = f"import sys, jaxdraft.tokenizers; print(*(set(sys.modules) & {heavy}))"
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == ""


@pytest.mark.slow
def test_transformers_loads_the_trained_folder(trained, sources):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(trained)
    theirs = transformers.AutoTokenizer.from_pretrained(trained)
    for text in [*sources[:5], *AWKWARD]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, 1024)


@pytest.mark.slow
def test_render_uses_the_chat_template(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "phi3-mini")
    text = tokenizer.render([{"role": "user", "content": "Hello"}])
    assert text.startswith("<|user|>\nHello<|end|>\n")
    assert text.rstrip().endswith("<|assistant|>")
    ids = tokenizer.encode(text, bos=False)
    assert [tokenizer.pieces()[i] for i in (ids[0], ids[-1])] == ["<|user|>", "<|assistant|>"]


@pytest.mark.slow
def test_a_template_in_its_own_file_writes_bos_once(trained, tmp_path):
    (copy_of(trained, tmp_path) / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.render(messages) == "<s>[user] Hello\n"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": messages}))
    [prompt] = PromptFile(str(tmp_path / "prompts.jsonl")).prompts(tokenizer)
    assert prompt.tokens == tuple(tokenizer.encode("[user] Hello\n"))
    assert prompt.tokens.count(tokenizer.bos_id) == 1


def test_a_continuation_keeps_its_first_space(shared_data):
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K-hf")
    ids = tokenizer.encode("Once upon a time, there was")
    for cut in range(1, len(ids)):
        whole = tokenizer.decode(ids[:cut]) + tokenizer.continuation(ids[:cut], ids[cut:])
        assert whole == "Once upon a time, there was"


@pytest.mark.parametrize("before", [None, "true"])
def test_one_thread_is_asked_for_and_given_back(monkeypatch, before):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    with single_threaded():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before
