"""What ``jaxdraft sample`` shows, on a real terminal and into a pipe: the text of the decoders, whole and in colour."""

import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxdraft.cli import main
from jaxdraft.data.prompts import example_id
from jaxdraft.decode import Speculation, SpeculativeResult, generate, live, speculative_generate
from jaxdraft.decode.batching import prompt_batches
from jaxdraft.decode.blocks import WithDraft
from jaxdraft.decode.driver import end_tokens
from jaxdraft.decode.generate import Alone
from jaxdraft.evaluate.measure import Model
from jaxdraft.evaluate.sample import origins
from jaxdraft.evaluate.terminal import Fragments, Screen
from jaxdraft.models import Decoder, ModelConfig, for_decoding, init_params
from jaxdraft.tokenizer_training import train_sentencepiece
from jaxdraft.tokenizers import load_tokenizer

NEW, SPECULATION = 40, Speculation(3)
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
SPLIT = "Hello 👩‍👩‍👧 wörld, naïve 日本語のテキスト 🙂🙃\n\n  indented\t½ ∑ 한국어 עברית. " * 3
ESCAPES = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_written_in_calls_is_what_is_written_in_one(monkeypatch, temperature):
    monkeypatch.setattr(live, "_CALL_SECONDS", 0.0)  # a block, or a token, at a time
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 2}
    parts = []
    for seed, layers in enumerate((2, 1)):
        config = ModelConfig(num_layers=layers, **shape)
        # Larger weights than a fresh model's, whose most likely tokens are nearly tied.
        params = jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(seed)))
        parts += [Decoder(config, scan=False), for_decoding(config, params)]
    decoding = {"temperature": temperature, "top_p": 0.9, "top_k": 0}
    decoding |= {"max_new_tokens": NEW, "example_ids": [5], "batch_size": 1}
    prompt, eos_E = [1, 2, 3], end_tokens(config, None)
    (batch,) = prompt_batches([prompt], **decoding, vocab_size=96, max_positions=128)
    write = lambda writer: list(live.write_live(writer, batch, seed=7, greedy=temperature == 0))
    drafted = write(WithDraft(*parts, SPECULATION, eos_E))
    assert drafted[-1].result == speculative_generate(*parts, [prompt], speculation=SPECULATION, seed=7, **decoding)[0]
    assert [len(progress.result.accepted) for progress in drafted] == list(range(1, len(drafted) + 1))
    assert sum(drafted[-1].result.accepted) > 0
    alone = write(Alone(*parts[:2], eos_E))
    assert [alone[-1].result.tokens] == generate(*parts[:2], [prompt], seed=7, **decoding)
    assert [len(progress.result.tokens) for progress in alone] == list(range(1, len(alone) + 1))


def test_origins_name_the_draft_s_tokens_and_the_refused_ones():
    result = SpeculativeResult([10, 11, 12, 13, 14], [2, 0, 3], True, [3, 3, 3], [99, 98, -1])
    assert origins(result) == [(10, True, -1), (11, True, -1), (12, False, 99), (13, False, 98), (14, True, -1)]


def whole(tokenizer):
    """Holds a text's fragments, from every point where a character ends, against the tokenizer's own decoding."""
    ids = tokenizer.encode(SPLIT)
    waited = 0
    for start in range(1, 40):
        if tokenizer.decode(ids[:start]).endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        fragments = Fragments(tokenizer, ids[:start])
        found = [fragments.add(id) for id in ids[start:]]
        assert "".join(found) == tokenizer.continuation(ids[:start], ids[start:])
        assert fragments.rest() == ""
        waited += found.count("")
    assert waited, "no character was split"
    fragments = Fragments(tokenizer, ids[:1])
    cut = next(i for i in range(2, len(ids)) if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode(ids[:i]))
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(fragments.add(id) for id in ids[1:cut])
    assert "\N{REPLACEMENT CHARACTER}" in fragments.rest()


def test_a_character_that_tokens_split_is_shown_when_it_is_whole(tmp_path):
    train_sentencepiece([Path(__file__).read_text()[:2000].encode("ascii", "ignore").decode()], tmp_path, 400)
    whole(load_tokenizer(tmp_path))


@pytest.mark.parametrize("name", ["llama2", "llama3", "phi3-mini"])
def test_characters_are_whole_in_the_papers_tokenizers(shared_data, name):
    whole(load_tokenizer(shared_data / "tokenizers" / name))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_are_for_terminals_that_have_them_and_people_who_want_them(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Screen(Terminal(), colour=True).has_colour
    assert not Screen(Terminal(), colour=False).has_colour
    assert not Screen(io.StringIO(), colour=True).has_colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Screen(Terminal(), colour=True).has_colour
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert not Screen(Terminal(), colour=True).has_colour


def test_no_terminal_obeys_what_a_model_writes():
    for stream, expected in ((Terminal(), "a\n\tb␛[2J␍"), (io.StringIO(), "a\n\tb\x1b[2J\r")):
        Screen(stream, colour=True).write("a\n\tb\x1b[2J\r")
        assert stream.getvalue() == expected


@pytest.fixture(scope="module")
def pair(shared_data, tmp_path_factory):
    """Two trained models of the same tokens, the target with a chat template; and both loaded."""
    target = tmp_path_factory.mktemp("sample") / "target"
    shutil.copytree(shared_data / "models" / "stories260K-hf", target, copy_function=shutil.copyfile)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    folders = target, shared_data / "models" / "llama2xs-hf"
    return folders, [Model.load(folder) for folder in folders]


def command(pair, *more):
    target, draft = map(str, pair[0])
    return ["sample", "--target", target, "--draft", draft, "--max-new-tokens", str(NEW), "--block-size", "3", *more]


def written(pair, text, bos=None, **decoding):
    """What ``speculative_generate`` writes after a text; random numbers are named by it."""
    (target, draft), tokenizer = pair[1], load_tokenizer(pair[0][0])
    prompt = tokenizer.encode(text, bos)
    name = example_id(tokenizer.decode(prompt, skip_special=False))
    parts = target.decoder, target.params, draft.decoder, draft.params
    decoding = {"max_new_tokens": NEW, "example_ids": [name], "batch_size": 1, **decoding}
    (result,) = speculative_generate(*parts, [prompt], speculation=SPECULATION, **decoding)
    return result, tokenizer.fragments([*prompt, *result.tokens])[len(prompt) :]


def coloured(result, fragments):
    pieces = zip(fragments, origins(result), strict=True)
    return "".join(f"\x1b[32m{text}\x1b[0m" if is_drafted else text for text, (_, is_drafted, _) in pieces)


def on_terminal(arguments, lines=(), **environment):
    """What the command shows on a terminal where a person types a line whenever asked for one, and then Ctrl-D."""
    screen, theirs = pty.openpty()
    program = [sys.executable, "-m", "jaxdraft.cli", *arguments]
    environment = {**os.environ, "TERM": "xterm", **environment}
    shown, typed = "", [*lines, None]
    with subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as run:
        os.close(theirs)
        while select.select([screen], [], [], 120)[0]:
            try:
                shown += os.read(screen, 2**16).decode()
            except OSError:  # how a terminal says that nobody writes to it any more
                break
            if ESCAPES.sub("", shown).endswith("\n> "):
                line = typed.pop(0)
                os.write(screen, b"\x04" if line is None else line.encode() + b"\n")
        else:
            run.kill()
    os.close(screen)
    return run.returncode, re.sub(r"[^\n]*\r(?!\n)", "", shown.replace("\r\n", "\n"))


def test_on_a_terminal_the_text_is_coloured_twice_the_same_and_followed_by_the_speeds(pair):
    result, fragments = written(pair, "Once upon a time")
    code, shown = on_terminal(command(pair, "--no-chat", "--prompt", "Once upon a time"))
    assert code == 0
    alone, drafted = shown.split("Once upon a time")[1:]
    assert alone.startswith("\x1b[0m" + "".join(fragments) + "\n")
    assert drafted.startswith("\x1b[0m" + coloured(result, fragments) + "\n")
    said = ESCAPES.sub("", drafted)
    blocks = len(result.accepted)
    assert f"{NEW} tokens in {blocks} runs of the target, {NEW / blocks:.2f} a run" in said
    assert f"{sum(result.complete) / 3 / len(result.complete):.0%} of the draft's tokens accepted" in said
    assert "the same text, token for token" in said
    alone, drafted = (float(rate.replace(",", "")) for rate in re.findall(r"([\d,.]+) tokens/s", said))
    assert float(re.search(r"([\d.]+)×", said)[1]) == pytest.approx(drafted / alone, abs=0.01)


def test_without_colour_there_is_no_escape_sequence(pair):
    more = ["--no-chat", "--no-compare", "--rejected", "--prompt", "Once", "--no-color"]
    code, shown = on_terminal(command(pair, *more))
    assert code == 0
    assert "\x1b" not in shown
    assert "with the draft" in shown
    assert "tokens/s" in shown


def test_lines_are_answered_one_after_another_as_a_conversation(pair):
    lines = ["Tell me a story.", "Another!"]
    code, shown = on_terminal(command(pair, "--no-compare", "--system", "Be brief."), lines)
    assert code == 0
    said = "<s>[system] Be brief.\n[user] Tell me a story.\n[assistant]"
    first = written(pair, said, bos=False)
    second = written(pair, f"{said} {''.join(first[1])}\n[user] Another!\n[assistant]", bos=False)
    one, two = shown.split("Ctrl-D ends.")[1].split("Another!")
    assert coloured(*first) + "\n" in one
    assert coloured(*second) + "\n" in two
    assert "compiled in" not in shown, "it was, before the first line"


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_into_a_pipe_goes_the_text_alone(pair, monkeypatch, capsys, temperature):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon\n"))
    assert main(command(pair, "--no-chat", "--prompt", "-", "--temperature", temperature)) == 0
    out, err = capsys.readouterr()
    _, fragments = written(pair, "Once upon", temperature=float(temperature))
    assert out == "Once upon" + "".join(fragments) + "\n"
    assert ("the same text" in err) == (temperature == "0")
    assert "\x1b" not in err


def test_a_target_by_itself_needs_no_draft(pair, capsys):
    target = str(pair[0][0])
    assert main(["sample", "--target", target, "--prompt", "Once", "--no-chat", "--max-new-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Once")
    assert "target alone" in err
    assert "runs of the target" not in err


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "give --prompt TEXT, or --prompt -"),
        (["--prompt", "a", "--no-chat", "--system", "b"], "leave out --no-chat"),
        (["--prompt", "a" * 600, "--no-chat"], "positions"),
        (["--prompt", "caf\udce9"], "not text in UTF-8"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(pair, monkeypatch, capsys, more, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main(command(pair, *more)) == 2
    assert message in capsys.readouterr().err
