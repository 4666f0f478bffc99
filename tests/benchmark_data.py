"""How fast text becomes rows, beside the tokenizer's library alone; and rows batches, beside training on them.

    python -m tests.benchmark_data                      # both
    python -m tests.benchmark_data prepare llama3       # one tokenizer
    python -m tests.benchmark_data read

The first part reads real text and tokenizers from the folder that JAXDRAFT_SHARED_DATA names. Both forms of a part run
in turn in one process; given are medians and the median ratio of a turn, by the clock and by seconds of the processor,
which other work on the machine changes less.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import sentencepiece
import tokenizers

from jaxdraft.context import Context
from jaxdraft.data.pipeline import Batches
from jaxdraft.data.records import PackedRows, write_rows
from jaxdraft.data.sources import Text
from jaxdraft.home import Home
from jaxdraft.losses import CrossEntropy
from jaxdraft.prepare import run_prepare
from jaxdraft.recipe import HFModel, Prepare, Recipe, Train
from jaxdraft.recipe_file import load_recipe
from tests.benchmark_step import batch_of, ours
from tests.conftest import ROOT

LENGTH = 2048
BATCH = 1000  # documents in a call of the library
ROUNDS = 7


def corpus(shared: Path, characters: int) -> list[str]:
    """Real text of several kinds, over and over."""
    texts = [json.loads(line)["text"] for line in (shared / "corpora" / "c4_demo.jsonl").open()]
    texts += (shared / "corpora" / "tinystories_head.txt").read_text().split("<|endoftext|>")
    texts += (shared / "corpora" / "wiki_demo.txt").read_text().split("\n = ")
    texts += [file.read_text() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    texts = [text for text in texts if text.strip()]
    repeats = -(-characters // sum(map(len, texts)))
    return texts * repeats


def library(folder: Path, texts: list[str]):
    """The library's own batch call over all texts, without taking the ids out of what it returns."""
    if folder.name.endswith(".model"):
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        encode = lambda batch: model.encode(batch, num_threads=os.cpu_count())
    else:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        encode = lambda batch: tokenizer.encode_batch_fast(batch, add_special_tokens=False)

    def run():
        for i in range(0, len(texts), BATCH):
            encode(texts[i : i + BATCH])

    return run


def prepared(folder: Path, tokenizer: Path, file: Path):
    """A Prepare stage from file to manifest; its facts."""
    stage = Prepare("text", sources=(Text(str(file)),), length=LENGTH)
    recipe = Recipe(
        title="",
        target="target",
        draft=load_recipe("quickstart").draft,
        tokenizer=HFModel(str(tokenizer)),
        stages=(stage, Train("target", data="text", loss=CrossEntropy(), batch_size=1, steps=1)),
    )
    context = Context(recipe, Home(folder / "run"))
    assert context.tokenizer.vocab_size

    def run():
        shutil.rmtree(folder / "run", ignore_errors=True)
        return run_prepare(stage, context)[1]

    return run


def timed(run):
    """Seconds on the clock and of the processor, and what ``run`` gives."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - clock, time.process_time() - cpu, result


def prepare(shared: Path, only: str | None, characters: int):
    texts = corpus(shared, characters)
    print(f"{sum(map(len, texts)):,} characters in {len(texts):,} documents; tokens/s, ratio by clock and by CPU")
    for name in (only,) if only else ("llama2", "llama2.model", "llama3", "phi3-mini"):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            tokenizer = shared / "tokenizers" / name.removesuffix(".model")
            if name.endswith(".model"):  # the same without tokenizer.json
                tokenizer = Path(shutil.copytree(tokenizer, folder / name))
                (tokenizer / "tokenizer.json").unlink()
            file = folder / "text.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
            alone, whole = library(tokenizer, texts), prepared(folder, tokenizer, file)
            alone(), whole()
            turns = [(timed(alone), timed(whole)) for _ in range(ROUNDS)]
        tokens = turns[0][1][2]["tokens"]
        rates = [tokens / statistics.median(turn[i][0] for turn in turns) for i in range(2)]
        clock, cpu = (statistics.median(a[i] / b[i] for a, b in turns) for i in range(2))
        print(f"{name:<14} library {rates[0]:11,.0f}  Prepare {rates[1]:11,.0f}  {clock:.2f} {cpu:.2f}", flush=True)


def read():
    """Batches of the quickstart's draft out of a file, and its step."""
    quickstart = load_recipe("quickstart")
    config = dataclasses.replace(quickstart.draft, vocab_size=2048)  # of its target
    stage = quickstart.stage("pretrain")
    rows, length, steps = stage.batch_size, quickstart.stage(stage.data).length, 200
    batch = batch_of(config, rows, length)
    step = ours(config, batch)
    with tempfile.TemporaryDirectory() as folder:
        one = {key: batch[key][0] for key in ("tokens", "segment_ids", "loss_mask")}
        settings = {"length": length, "vocab_size": config.vocab_size, "tokenizer_fingerprint": "", "source": {}}
        write_rows(folder, (one for _ in range(20_000)), **settings)
        batches = Batches({"corpus": PackedRows(folder)}, batch_size=rows, seed=0)

        def reading():
            for i in range(steps):
                batches.part(i, slice(None))

        def training():
            for _ in range(20):
                step()

        reading(), training()
        turns = [(timed(reading)[0] / steps, timed(training)[0] / 20) for _ in range(ROUNDS)]
    reads, trains = (rows * length / statistics.median(turn[i] for turn in turns) for i in range(2))
    ratio = statistics.median(b / a for a, b in turns)
    print(f"{config.num_parameters:,} parameters, {rows} × {length}: reads {reads:,.0f}, trains {trains:,.0f} tokens/s")
    print(f"reading is {ratio:.0f} times as fast")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "prepare", "read"), default="all")
    parser.add_argument("tokenizer", nargs="?", help="a folder of tokenizers/; with .model its SentencePiece model")
    parser.add_argument("--characters", type=int, default=30_000_000)
    options = parser.parse_args()
    if options.what != "read":
        shared = Path(os.environ.get("JAXDRAFT_SHARED_DATA", ROOT.parent / "shared" / "data"))
        prepare(shared, options.tokenizer, options.characters)
    if options.what != "prepare":
        read()
