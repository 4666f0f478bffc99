"""A Generate stage whose answers come from a real server: the same shards, ids and account as from our own decoder."""

import json

import pytest

from jaxdraft.data.prompts import PromptFile
from jaxdraft.models import ModelConfig
from jaxdraft.recipe import Generate, HFModel, Recipe
from jaxdraft.run import run
from jaxdraft.server import Server
from jaxdraft.tracking import read_jsonl
from tests.server.proxy import Broken, Proxy


@pytest.fixture(scope="module")
def recipe(served, shared_data, tmp_path_factory):
    text = (shared_data / "corpora" / "tinystories_head.txt").read_text("utf-8")
    rows = [{"prompt": " ".join(part.split()[: 4 + i])} for i, part in enumerate(text.split("\n\n")[:8])]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(server: Server | None) -> Recipe:
        stage = Generate(
            "responses",
            prompts=(PromptFile(str(path)),),
            length=64,
            temperatures=(0.0,),
            max_new_tokens=12,
            batch_size=8,
            shard_size=2,
            server=server,
        )
        draft = ModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
        return Recipe(title="served", target=HFModel(str(served)), draft=draft, stages=(stage,))

    return made


def answers(workdir):
    paths = sorted((workdir / "responses").glob("responses-*.jsonl"))
    return [{**line, "text": None} for path in paths for line in read_jsonl(path)]


def test_greedy_answers_are_those_of_our_own_decoder(llama_cpp, recipe, tmp_path):
    run(recipe(None), tmp_path / "own")
    run(recipe(Server(llama_cpp.url, concurrency=1)), tmp_path / "served")
    assert answers(tmp_path / "served") == answers(tmp_path / "own")
    account = json.loads((tmp_path / "served" / "responses" / "answers.json").read_text())
    assert account["answers"] == {"asked": 8, "written": 8, "errors": {}}
    assert account["generator"]["server"]["url"] == llama_cpp.url
    assert (tmp_path / "served" / "responses" / "manifest.json").exists()


def test_what_was_answered_before_a_server_failed_is_kept(llama_cpp, recipe, tmp_path):
    failing = [True]
    fault = Broken(500, body={"error": {"message": "CUDA error"}})
    with Proxy(llama_cpp.url, lambda request, number: fault if failing[0] and number > 5 else None) as proxy:
        server = Server(proxy.url, concurrency=1, retries=1)
        with pytest.raises(OSError, match="500: CUDA error"):
            run(recipe(server), tmp_path)
        kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "responses").glob("responses-*.jsonl")}
        assert 1 <= len(kept) < 4
        failing[0], before = False, len(proxy.requests)
        run(recipe(server), tmp_path)
        probes = 2
        assert len(proxy.requests) - before == 8 - 2 * len(kept) + probes
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert sorted(line["number"] for line in answers(tmp_path)) == list(range(8))
