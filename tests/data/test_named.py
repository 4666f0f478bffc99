"""Each named data set on files of its own columns, and on the real samples where they are here."""

import collections
import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from jaxdraft import untrusted
from jaxdraft.data.catalogue import CORPORA, PROMPTS
from jaxdraft.data.named import Corpus, Instructions
from jaxdraft.data.prompts import Prompt
from jaxdraft.data.quarantine import Rejected
from jaxdraft.errors import ConfigError
from jaxdraft.licences import is_expression
from jaxdraft.recipe_file import load_recipe
from jaxdraft.tokenizers import load_tokenizer

BEFORE = "Below is an instruction that describes a task"
AFTER = ". Write a response that appropriately completes the request.\n\n### Instruction:\n"
WITH_INPUT = ", paired with an input that provides further context"


def put(folder, name, rows):
    """Rows as a file of a repository, in the form that its name says; returns the repository's folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    return str(folder)


def kept(items) -> list:
    return [item for item in items if not isinstance(item, Rejected)]


def reasons(items) -> list[str]:
    return [item.reason for item in items if isinstance(item, Rejected)]


PARQUET = "-00000-of-00001-0123456789abcdef.parquet"
# name, file, rows, [(id, what the user says, plain text, answer)]
SETS = [
    (
        "oig-small-chip2",
        f"data/train{PARQUET}",
        [{"user": " Why? ", "chip2": "Because."}, {"user": "Why?", "chip2": "So."}, {"user": "", "chip2": "x"}],
        [("oig-small-chip2:0", "Why?", f"{BEFORE}{AFTER}Why?\n\n### Response:", "Because.")],
        ["duplicate", "blank"],
    ),
    (
        "alpaca",
        f"data/train{PARQUET}",
        [
            {"instruction": "Add.", "input": "1 2", "output": "3", "text": "…"},
            {"instruction": "Add.", "input": "", "output": "What?", "text": "…"},
        ],
        [
            (
                "alpaca:0",
                "Add.\n\n1 2",
                f"{BEFORE}{WITH_INPUT}{AFTER}Add.\n\n### Input:\n1 2\n\n### Response:",
                "3",
            ),
            ("alpaca:1", "Add.", f"{BEFORE}{AFTER}Add.\n\n### Response:", "What?"),
        ],
        [],
    ),
    (
        "evol-instruct",
        "EvolInstruct-Code-80k.json",
        [{"instruction": "Sort.", "output": "sorted()"}, {"instruction": None, "output": "x"}],
        [("evol-instruct:0", "Sort.", f"{BEFORE}{AFTER}Sort.\n\n### Response:", "sorted()")],
        ["field 'instruction' is NoneType, not text"],
    ),
    (
        "dolly",
        "databricks-dolly-15k.jsonl",
        [
            {"instruction": "Who?", "context": "A\nB\n", "response": "B", "category": "closed_qa"},
            {"context": "", "response": "x", "category": "open_qa"},
        ],
        [
            (
                "dolly:0",
                "Who?\n\nA\nB",
                f"{BEFORE}{WITH_INPUT}{AFTER}Who?\n\n### Input:\nA\nB\n\n### Response:",
                "B",
            )
        ],
        ["no field 'instruction'"],
    ),
    (
        "xsum",
        "data/test-00000-of-00001.parquet",
        [{"document": "News.\n", "summary": "N.", "id": "7"}],
        [("7", "Summarize: News.", "Summarize: News.\n\n", "N.")],
        [],
    ),
    (
        "cnn-dailymail",
        "3.0.0/test-00000-of-00001.parquet",
        [{"article": "News.", "highlights": "N .", "id": "abc"}],
        [
            (
                "abc",
                "In 2 or 3 sentences, what are the main points one should remember from this news article?"
                "\n\nArticle: News.",
                "In 2 or 3 sentences, what are the main points one should remember from this news article?"
                "\n\nArticle: News.\n",
                "N .",
            )
        ],
        [],
    ),
    (
        "humaneval",
        "openai_humaneval/test-00000-of-00001.parquet",
        [{"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "…"}],
        [
            (
                "HumanEval/0",
                "Complete the following Python function.\n\n```python\ndef f():\n```",
                "def f():\n",
                "    return 1\n",
            )
        ],
        [],
    ),
    (
        "wmt18-de-en",
        "de-en/test-00000-of-00001.parquet",
        [{"translation": {"de": "Ja.", "en": "Yes."}}],
        [
            (
                "wmt18-de-en:0",
                "Translate the following sentence from German to English:\n\nJa.",
                "German: Ja.\nEnglish:",
                "Yes.",
            )
        ],
        [],
    ),
]


@pytest.mark.parametrize("name, file, rows, expected, rejected", SETS, ids=[each[0] for each in SETS])
def test_prompts_and_conversations(tmp_path, tokenizer, name, file, rows, expected, rejected):
    source = Instructions(name, put(tmp_path, file, rows), form="plain")
    items = list(source.prompts(tokenizer))
    assert [(p.id, p.text, p.reference) for p in kept(items)] == [
        (id, text, answer) for id, _, text, answer in expected
    ]
    assert [p.tokens for p in kept(items)] == [tuple(tokenizer.encode(text)) for _, _, text, _ in expected]
    assert reasons(items) == rejected
    conversations = list(source.conversations())
    assert kept(conversations) == [
        (id, ({"role": "user", "content": asked}, {"role": "assistant", "content": answer}))
        for id, asked, _, answer in expected
    ]
    assert reasons(conversations) == rejected


JUNK = [None, 3, True, "", "text", [], ["text"], [None], {}, {"text": 1}, {"replies": 1}, {"replies": [3]}]
KEYS = ("replies", "text", "message_id", "de", "blob_id")


@pytest.mark.parametrize("name", [*PROMPTS, "stack-v2-smol"])
def test_rows_of_any_other_shape_are_rejected(tmp_path, tokenizer, name):
    path = str(tmp_path / "rows.jsonl")
    columns = (CORPORA | PROMPTS)[name].columns
    nearly = [{"lang": "en", "text": "a", "role": "prompter", key: junk} for junk in JUNK for key in KEYS]
    rows = [*JUNK, *(dict.fromkeys(columns, value) for value in (*JUNK, *nearly))]
    put(tmp_path, "rows.jsonl", rows)
    if name in CORPORA:
        items = list(Corpus(name, path, contents=str(tmp_path)).documents())
    else:
        source = Instructions(name, path, form="plain")
        items = [*source.prompts(tokenizer), *source.conversations()]
    assert len(reasons(items)) > len(kept(items))
    assert all(isinstance(item, Rejected | Prompt | tuple) for item in items)


def message(id, role, text, replies=(), rank=None, **facts):
    settled = {"message_id": id, "text": text, "role": role, "lang": "en", "deleted": False, "review_result": True}
    return settled | {"rank": rank, "replies": list(replies)} | facts


TREE = message(
    "q",
    "prompter",
    "Hello?",
    [
        message("a2", "assistant", "Worse.", [message("q2", "prompter", "Why worse?")], rank=1),
        message(
            "a1",
            "assistant",
            "Best.",
            [
                message("q1", "prompter", "More?", [message("a3", "assistant", "More.", rank=0)]),
                message("q3", "prompter", "Mehr?", lang="de"),
            ],
            rank=0,
        ),
        message("a4", "assistant", "Gone.", [message("q4", "prompter", "Gone?")], rank=None, deleted=True),
        message("a5", "assistant", "Bad.", [message("q5", "prompter", "Bad?")], rank=2, review_result=False),
    ],
)


def test_every_turn_of_a_prompter_in_a_tree_is_a_prompt(tmp_path, tokenizer):
    trees = [{"message_tree_id": "q", "prompt": TREE}, {"prompt": message("u", "prompter", "Anyone?")}, {"prompt": 1}]
    folder = put(tmp_path, "2023-04-12_oasst_ready.trees.jsonl.gz", trees)
    source = Instructions("oasst1", folder, form="plain")
    items = list(source.prompts(tokenizer))
    assert [(p.id, p.reference) for p in kept(items)] == [("q", "Best."), ("q2", None), ("q1", "More."), ("u", None)]
    assert kept(items)[2].text == (
        f"{BEFORE}. Write a response that appropriately completes the request.\n\n### Instruction:\nHello?\n\n"
        "### Response:\nBest.\n\n### Instruction:\nMore?\n\n### Response:"
    )
    assert reasons(items) == ["not in English", "deleted", "failed its review", "not a message tree"]
    [whole] = kept(source.conversations())
    assert whole.id == "q1"
    assert [m["content"] for m in whole.messages] == ["Hello?", "Best.", "More?", "More."]
    assert [m["role"] for m in whole.messages] == ["user", "assistant"] * 2
    assert reasons(source.conversations()) == [*reasons(items)[:3], "no answer", "not a message tree"]


def test_limits_splits_and_files(tmp_path, tokenizer):
    rows = [{"document": "x" * n, "summary": "s", "id": str(n)} for n in (1, 90, 2, 3)]
    for split in ("test", "train"):
        put(tmp_path, f"data/{split}-00000-of-00002.parquet", rows[:2])
        put(tmp_path, f"data/{split}-00001-of-00002.parquet", rows[2:])
    settings = {"path": str(tmp_path), "form": "plain"}
    items = list(Instructions("xsum", **settings, limit=2, max_tokens=40).prompts(tokenizer))
    assert [item.reason if isinstance(item, Rejected) else item.id for item in items] == [
        "1",
        "more than 40 tokens",
        "2",
    ]
    provenance = Instructions("xsum", **settings, split="train").provenance()
    assert provenance["files"] == [str(tmp_path / f"data/train-0000{i}-of-00002.parquet") for i in (0, 1)]
    assert "BBC" in provenance["terms"]
    one = Instructions("xsum", str(tmp_path / "data" / "test-00001-of-00002.parquet"), form="plain")
    assert [prompt.id for prompt in one.prompts(tokenizer)] == ["2", "3"]
    assert one.fingerprint() != Instructions("xsum", **settings).fingerprint()
    with pytest.raises(ConfigError, match=r'no chat template .* for xsum, form="plain"'):
        list(Instructions("xsum", str(tmp_path)).prompts(tokenizer))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Instructions("alpacca"), "no data set for Instructions 'alpacca': did you mean 'alpaca'"),
        (lambda: Instructions("fineweb"), "There are: alpaca, cnn-dailymail"),
        (lambda: Corpus("fine-web"), "did you mean 'fineweb'"),
        (lambda: Instructions("xsum", split="tests"), "xsum: no split 'tests': did you mean 'test'"),
        (lambda: Instructions("xsum", form="text"), "must be one of chat, plain"),
        (lambda: Corpus("fineweb", "/nowhere").fingerprint(), r"/nowhere/sample/10BT/\*\.parquet: no such file"),
    ],
)
def test_what_there_is_not_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_every_entry_says_where_it_is_from():
    for name, entry in {**CORPORA, **PROMPTS}.items():
        assert entry.repository.count("/") == 1, name
        assert is_expression(entry.licence), name
        assert entry.reference, name
        assert len(entry.revision) == 40, name


@pytest.mark.parametrize(
    "name, file",
    [
        ("fineweb", "sample/10BT/000_00000.parquet"),
        ("c4", "en/c4-train.00000-of-01024.json.gz"),
        ("tinystories", "data/train-00000-of-00004-2d5a1467fff1081b.parquet"),
    ],
)
def test_corpora_of_one_column(tmp_path, name, file):
    rows = [{"text": "one", "url": "u"}, {"text": " ", "url": "v"}, {"text": "two", "url": "w"}]
    corpus = Corpus(name, put(tmp_path, file, rows))
    assert list(corpus.documents()) == ["one", Rejected(f"{tmp_path / file}: {corpus_row(file)}", "blank"), "two"]
    assert list(Corpus(name, str(tmp_path), limit=1).documents()) == ["one"]


def corpus_row(file) -> str:
    return "row 1" if file.endswith(".parquet") else "line 2"


def test_tinystories_as_text(tmp_path):
    path = tmp_path / "TinyStories-valid.txt"
    path.write_text("One.\n\nTwo.\n<|endoftext|>\nThree.\n<|endoftext|>\n")
    assert list(Corpus("tinystories", str(path)).documents()) == ["One.\n\nTwo.", "Three."]


def test_wikitext_lines_become_articles(tmp_path):
    lines = ["", " = A = \n", "", " = = Section = = \n", "", " Text = 1 . \n", "", " = B = \n", " = Not = \n"]
    articles = ["\n = A = \n\n = = Section = = \n\n Text = 1 . \n\n", " = B = \n = Not = \n"]
    expected = [articles[0][1:], articles[1]]
    folder = put(tmp_path, "wikitext-2-raw-v1/train-00000-of-00001.parquet", [{"text": line} for line in lines])
    assert list(Corpus("wikitext-2", folder).documents()) == expected
    raw = tmp_path / "wiki.train.raw.txt"
    raw.write_text("".join(line or " \n" for line in lines))
    assert list(Corpus("wikitext-2", str(raw)).documents()) == expected


def test_stack_contents(tmp_path):
    contents = tmp_path / "contents"
    contents.mkdir()
    (contents / "b1").write_bytes(gzip.compress(b"print(1)\n"))
    (contents / "b2").write_bytes(gzip.compress("x = 'ä'\n".encode("latin-1")))
    (contents / "b3").write_bytes(b"not gzip")
    (contents / "b5").write_bytes(gzip.compress(b"\xff"))
    files = [{"blob_id": f"b{i}", "path": f"{i}.py", "src_encoding": "UTF-8"} for i in range(8)]
    files[2]["src_encoding"] = "ISO-8859-1"
    files[6]["is_vendor"] = files[7]["is_generated"] = True
    rows = [{"repo_name": "a/b", "files": files[:3]}, {"repo_name": "c/d", "files": files[3:]}]
    folder = put(tmp_path, "data/train-00000-of-00064.parquet", rows)
    corpus = Corpus("stack-v2-smol", folder, contents=str(contents))
    items = list(corpus.documents())
    assert [item if isinstance(item, str) else item.reason for item in items] == [
        "content not found",
        "print(1)\n",
        "x = 'ä'\n",
        "content is not gzip",
        "content not found",
        "content is not in its encoding",
        "vendored",
        "generated",
    ]
    assert items[0].where.endswith("train-00000-of-00064.parquet: row 0: 0.py")
    inline = put(tmp_path / "inline", "data/train-0.parquet", [{"files": [{"path": "a.py", "content": "pass\n"}]}])
    assert list(Corpus("stack-v2-smol", inline).documents()) == ["pass\n"]


def test_stack_contents_made_to_harm(tmp_path):
    (tmp_path / "contents").mkdir()
    for name, size in {"bomb": untrusted.LINE_BYTES + 1, "fits": 9}.items():
        (tmp_path / "contents" / name).write_bytes(gzip.compress(b" " * size + b"x"))
    files = [{"blob_id": name, "src_encoding": "UTF-8"} for name in ("bomb", "../../private")]
    files += [
        {"blob_id": "fits", "src_encoding": encoding} for encoding in ("a\0b", "idna\0", "zlib", "../os", "x" * 999)
    ]
    folder = put(tmp_path, "data/train-0.parquet", [{"files": files}])
    items = list(Corpus("stack-v2-smol", folder, contents=str(tmp_path / "contents")).documents())
    assert [item.reason for item in items] == [
        "content has more than 67,108,864 bytes",
        "field 'blob_id' is no id",
        *["content is not in its encoding"] * 5,
    ]


@pytest.mark.parametrize(
    "name, file, count, left_out",
    [
        ("oasst1", "oasst_en_100_tree.jsonl", 480, {}),
        ("alpaca", "instruction-data-1100.json", 1075, {"duplicate": 25}),
        ("humaneval", "HumanEval.jsonl.gz", 164, {}),
        ("wmt18-de-en", "wmt_de_en_80.jsonl", 80, {}),
        ("dolly", "dolly_151.jsonl", 151, {}),
        ("xsum", "xsum_t0.jsonl", 200, {}),
        ("cnn-dailymail", "cnn_dm_t0.jsonl", 195, {"duplicate": 5}),
    ],
)
def test_real_prompts(shared_data, tokenizer, name, file, count, left_out):
    items = list(Instructions(name, str(shared_data / "prompts" / file), form="plain").prompts(tokenizer))
    assert len(kept(items)) == len({prompt.id for prompt in kept(items)}) == count
    assert collections.Counter(reasons(items)) == left_out
    assert all(prompt.reference for prompt in kept(items)) or name == "oasst1"


@pytest.mark.parametrize(
    "name, sample, file, pattern, columns",
    [
        (
            "dolly",
            "dolly_151.jsonl",
            "databricks-dolly-15k.jsonl",
            r".*### Instruction:\n(.*?)(?:\n\n### Input:\n(.*))?\n\n### Response:",
            ("instruction", "context"),
        ),
        ("xsum", "xsum_t0.jsonl", "data/test-00000-of-00001.parquet", r"Summarize: (.*)\n", ("document",)),
        (
            "cnn-dailymail",
            "cnn_dm_t0.jsonl",
            "3.0.0/test-00000-of-00001.parquet",
            r"In 2 or 3 sentences, .*?\n\nArticle: (.*)\n",
            ("article",),
        ),
    ],
)
def test_plain_prompts_are_those_of_real_samples(
    tmp_path, shared_data, tokenizer, name, sample, file, pattern, columns
):
    """The samples were rendered by others: their columns, taken from the text, give the same text again."""
    lines = (shared_data / "prompts" / sample).read_text().splitlines()
    texts = list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))
    rows = [dict(zip(columns, re.fullmatch(pattern, text, re.DOTALL).groups(""), strict=True)) for text in texts]
    prompts = kept(Instructions(name, put(tmp_path, file, rows), form="plain").prompts(tokenizer))
    assert [prompt.text for prompt in prompts] == texts


def test_c4_is_the_same_in_every_format(tmp_path, shared_data):
    corpora = shared_data / "corpora"
    records = list(Corpus("c4", str(corpora / "c4_arrayrecord" / "*")).documents())
    lines = list(Corpus("c4", str(corpora / "c4_demo.jsonl")).documents())
    parquet = list(Corpus("c4", str(corpora / "c4_parquet" / "*")).documents())
    assert [len(documents) for documents in (records, lines, parquet)] == [1000, 300, 200]
    folder = put(tmp_path, "en/c4-train.00000-of-01024.json.gz", [{"text": text} for text in records])
    assert list(Corpus("c4", folder).documents()) == records
    again = put(tmp_path, "c4.parquet", [{"text": text} for text in lines])
    assert list(Corpus("c4", f"{again}/c4.parquet").documents()) == lines


def test_real_wikitext(shared_data):
    articles = list(Corpus("wikitext-2", str(shared_data / "corpora" / "wikitext2_valid.txt")).documents())
    assert len(articles) == 60  # as published
    assert articles[0].startswith(" = Homarus gammarus = \n\n Homarus gammarus , known as")


@pytest.mark.slow
def test_chat_prompts_go_through_the_chat_template(tmp_path, shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "phi3-mini")
    folder = put(tmp_path, "2023-04-12_oasst_ready.trees.jsonl.gz", [{"message_tree_id": "q", "prompt": TREE}])
    prompt = kept(Instructions("oasst1", folder).prompts(tokenizer))[2]
    messages = [{"role": role, "content": content} for role, content in CHAT]
    assert prompt.messages == tuple(messages)
    assert prompt.text == tokenizer.render(messages)
    assert prompt.tokens == tuple(tokenizer.encode(prompt.text, bos=False))


CHAT = [("user", "Hello?"), ("assistant", "Best."), ("user", "More?")]

RECIPE = """
from jaxdraft.data.named import Corpus, Instructions
from jaxdraft.models import presets
from jaxdraft.recipe import Generate, HFModel, Prepare, Recipe

def recipe(*, text: Corpus = Corpus("fineweb"), oasst: Instructions = Instructions("oasst1", limit=9)):
    stages = (
        Prepare("text", sources=(text,), length=8),
        Generate("answers", prompts=(oasst,), length=8, max_new_tokens=4),
    )
    return Recipe(title="t", target=HFModel("x"), draft=presets.llama2_chat_drafter_115m, stages=stages)
"""


def test_settings_from_the_command_line(tmp_path):
    (tmp_path / "r.py").write_text(RECIPE)

    def sources(*assignments):
        text, oasst = load_recipe(str(tmp_path / "r.py"), assignments).stages
        return text.sources[0], oasst.prompts[0]

    here = sources("text.path=some/folder", "oasst.path=trees.jsonl", "oasst.form=plain", "oasst.max_tokens=256")
    trees = Instructions("oasst1", "trees.jsonl", limit=9, max_tokens=256, form="plain")
    assert here == (Corpus("fineweb", "some/folder"), trees)
    assert sources("text.path=x", "text.path=none", "oasst.limit=none") == (Corpus("fineweb"), Instructions("oasst1"))
    assert sources("text.name=c4", "text.limit=1_000")[0] == Corpus("c4", limit=1000)
    assert sources("text.path=x", "answers.prompts.0.split=train")[1].split == "train"
    for wrong, message in (
        ("oasst.name=alpacca", "did you mean 'alpaca'"),
        ("oasst.form=chatty", "one of chat, plain"),
    ):
        with pytest.raises(ConfigError, match=message):
            sources(wrong)


def test_a_turn_of_a_tree_that_says_nothing_ends_what_goes_through_it(tmp_path):
    """Else a draft learns to answer with its end token alone."""

    def message(role, text, id, *replies):
        return {"role": role, "text": text, "message_id": id, "lang": "en", "replies": list(replies)}

    silent = message("assistant", " ", "b", message("prompter", "Again?", "c", message("assistant", "Yes.", "d")))
    tree = message("prompter", "Well?", "a", silent, message("assistant", "Well.", "e"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": tree}) + "\n")
    found = list(Instructions("oasst1", path=str(tmp_path / "a.jsonl")).conversations())
    assert [[turn["content"] for turn in each.messages] for each in found if not isinstance(each, Rejected)] == [
        ["Well?", "Well."]
    ]
    assert [each.reason for each in found if isinstance(each, Rejected)] == ["blank"]
