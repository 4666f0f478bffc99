"""Each thing that keeps an engine from taking a draft, planted in a clean pair of folders."""

import dataclasses
import json
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from jaxdraft.check import ENGINES, check_pair
from jaxdraft.cli import main
from jaxdraft.errors import ConfigError
from jaxdraft.export import export_model, export_untrained
from jaxdraft.models import ModelConfig, init_params
from jaxdraft.models.hf import load_config, load_model
from jaxdraft.tokenizer_training import train_sentencepiece

SERVERS = {"vllm", "sglang"}
TARGET = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=1024,
    num_layers=6,
    num_heads=4,
    num_kv_heads=4,
    rope_theta=500000.0,
    tie_embeddings=False,
)
DRAFT = dataclasses.replace(TARGET, num_layers=1, intermediate_size=256)


def write(folder, config, tokenizer):
    params = init_params(config, jax.random.key(0))
    export_model(folder, config, params, tokenizer, provenance={}, vocabulary="draft" if config.head_ids else "full")
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Clean target, draft and Phi-3-shaped draft and target."""
    root = tmp_path_factory.mktemp("check")
    texts = [path.read_text("utf-8") for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))]
    train_sentencepiece(texts, root / "tokenizer", 512)
    for name, config in {"target": TARGET, "draft": DRAFT}.items():
        write(root / name, config, root / "tokenizer")
        write(root / f"phi3-{name}", dataclasses.replace(config, family="phi3"), root / "tokenizer")
    return root


@pytest.fixture
def pair(clean, tmp_path):
    for name in ("target", "draft", "phi3-target", "phi3-draft"):
        shutil.copytree(clean / name, tmp_path / name)
    return tmp_path


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def problems(root, prefix=""):
    """(engine, rule) -> verdict and text, of all that is not well."""
    found: dict = {}
    for f in check_pair(root / f"{prefix}target", root / f"{prefix}draft"):
        if f.verdict in ("warn", "fail"):
            before = found.get((f.engine, f.rule), ("", ""))[1]
            found[f.engine, f.rule] = f.verdict, f"{before}{f.found}; "
    return found


@pytest.mark.parametrize("prefix", ["", "phi3-"])
def test_a_clean_pair_passes_for_every_engine(clean, prefix):
    assert problems(clean, prefix) == {}
    assert main(["check", "--target", str(clean / f"{prefix}target"), "--draft", str(clean / f"{prefix}draft")]) == 0


def swap_pieces(draft, first=400):
    def swap(data):
        vocab = data["model"]["vocab"]
        by_id = {i: piece for piece, i in vocab.items()}
        vocab[by_id[first]], vocab[by_id[first + 1]] = first + 1, first

    edit(draft / "tokenizer.json", swap)


def swap_in_model(draft):
    model = sentencepiece_model_pb2.ModelProto.FromString((draft / "tokenizer.model").read_bytes())
    model.pieces[400].piece, model.pieces[401].piece = model.pieces[401].piece, model.pieces[400].piece
    (draft / "tokenizer.model").write_bytes(model.SerializeToString())


def rewrite(draft, change):
    tensors = load_file(draft / "model.safetensors")
    change(tensors)
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})


def lost_tensor(draft):
    rewrite(draft, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))


def not_finite(draft):
    rewrite(draft, lambda tensors: tensors["model.norm.weight"].fill(float("nan")))


def drop_format(draft):
    path = draft / "model.safetensors"
    save_file(load_file(path), path)


def drop_generation(draft):
    (draft / "generation_config.json").unlink()


def config_change(**values):
    return lambda draft: edit(draft / "config.json", lambda data: data.update(values))


def other_add_bos(draft):
    edit(draft / "tokenizer.json", lambda data: data.update(post_processor=None))


def other_bos(draft):
    edit(draft / "tokenizer_config.json", lambda data: data.update(bos_token="</s>"))


def other_eos(draft):
    edit(draft / "tokenizer_config.json", lambda data: data.update(eos_token="<s>"))


def other_pad(draft):
    edit(draft / "tokenizer_config.json", lambda data: data.update(pad_token="<s>"))


def other_add_eos(draft):
    edit(draft / "tokenizer_config.json", lambda data: data.update(add_eos_token=True))


def truncated_weights(draft):
    path = draft / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def pickled(draft):
    (draft / "pytorch_model.bin").write_bytes(b"")


def only_new_dialect(draft):
    edit(draft / "config.json", lambda data: data.pop("rope_theta"))


def only_in_rope_scaling(draft):
    only_new_dialect(draft)
    scaling = {"rope_type": "default", "rope_theta": 500000.0}
    edit(draft / "config.json", lambda data: data.update(rope_scaling=scaling))


@pytest.mark.parametrize(
    "plant, rule, verdict, engines, words",
    [
        (swap_pieces, "tokenizer", "fail", set(ENGINES), "id 400 is .* 2 of 512 pieces differ"),
        (other_bos, "tokenizer", "fail", set(ENGINES), "BOS is 1 in the target and 2 in the draft"),
        (other_add_bos, "tokenizer", "fail", set(ENGINES), "add_bos is True in the target and False in the draft"),
        (config_change(bos_token_id=5), "special ids", "warn", set(ENGINES), "bos_id is 1 in the target, 5"),
        (other_eos, "tokenizer", "fail", set(ENGINES[:4]), "EOS is 2 in the target and 1 in the draft"),
        (other_pad, "pad token", "fail", {"openvino"}, "pad_token: target None, draft <s>"),
        (other_add_eos, "added tokens", "fail", {"llama.cpp"}, "add_eos_token: target .*, draft True"),
        (swap_in_model, "converted pieces", "fail", {"llama.cpp"}, r"id 400 is .* \(2 differ\)"),
        (lost_tensor, "weights", "fail", set(ENGINES), "up_proj.weight is missing"),
        (not_finite, "weights", "fail", set(ENGINES), "final_norm holds numbers that are not finite"),
        (truncated_weights, "safetensors format", "fail", set(ENGINES), "HeaderTooLarge|header|Metadata"),
        (pickled, "pickled weights", "warn", set(ENGINES), "pytorch_model.bin can run code"),
        (drop_format, "safetensors format", "fail", {"transformers"}, "metadata format is missing"),
        (only_new_dialect, "rope dialects", "fail", set(ENGINES) - {"openvino"}, "rope_theta 500000 only in"),
        (only_in_rope_scaling, "rope dialects", "fail", set(ENGINES) - {"openvino"}, "500000 only in rope_scaling"),
        (config_change(hidden_size="256"), "size", "fail", set(ENGINES), 'hidden_size is "256", but must be a whole'),
        (config_change(model_type=["llama"]), "head size", "fail", set(ENGINES), "is not supported"),
        (
            config_change(rope_parameters=[]),
            "rope dialects",
            "fail",
            set(ENGINES),
            "rope_parameters is \\[\\], but must",
        ),
        (config_change(auto_map={"AutoModel": "x.Y"}), "own code", "warn", set(ENGINES), "auto_map"),
        (
            lambda d: (d / "generation_config.json").unlink(),
            "assisted generation",
            "warn",
            {"transformers"},
            "20 tokens",
        ),
        (lambda d: (d / "config.json").unlink(), "size", "fail", set(ENGINES), "does not exist"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_planted_is_named(pair, plant, rule, verdict, engines, words):
    plant(pair / "draft")
    found = problems(pair)
    named = {engine for engine, of_rule in found if of_rule == rule and found[engine, of_rule][0] == verdict}
    assert named == engines
    for engine in engines:
        assert re.search(words, found[engine, rule][1])
    wrong = verdict == "fail"
    assert main(["check", "--target", str(pair / "target"), "--draft", str(pair / "draft")]) == (2 if wrong else 0)


def test_llama_cpp_does_not_compare_the_first_five_pieces(pair):
    swap_pieces(pair / "draft", first=3)
    found = problems(pair)
    assert {engine: found[engine, "tokenizer"][0] for engine in ENGINES} == {
        **dict.fromkeys(ENGINES[:4], "fail"),
        "llama.cpp": "warn",
    }
    assert "id 3 is" in found["llama.cpp", "tokenizer"][1]
    assert "compares ids 5 to 511 only" in found["llama.cpp", "tokenizer"][1]


@pytest.mark.parametrize("plant", [other_bos, other_add_bos, lambda draft: swap_pieces(draft, first=4)])
def test_llama_cpp_fails_on_bos_and_on_a_piece_it_compares(pair, plant):
    swap_pieces(pair / "draft", first=3)
    plant(pair / "draft")
    assert problems(pair)["llama.cpp", "tokenizer"][0] == "fail"


def test_llama_cpp_needs_one_type_of_vocabulary(pair):
    (pair / "draft" / "tokenizer.model").unlink()
    assert ("llama.cpp", "vocab type") not in problems(pair)  # a BPE with byte fallback is stored as SPM too
    whole = (pair / "draft" / "tokenizer.json").read_text()
    for change in (
        lambda data: data["model"].update(byte_fallback=False),
        lambda data: data.update(decoder={"type": "Fuse"}),
        lambda data: data.update(decoder=None),
    ):
        (pair / "draft" / "tokenizer.json").write_text(whole)
        edit(pair / "draft" / "tokenizer.json", change)
        assert problems(pair)["llama.cpp", "vocab type"] == ("fail", "converted, target SPM, draft BPE; ")


def test_what_transformers_does_not_open_is_a_finding(pair, monkeypatch):
    class Auto:
        def from_pretrained(self, folder, **options):
            raise KeyError("Missing required keys")

    fake = SimpleNamespace(AutoModelForCausalLM=Auto(), __version__="5.23.0")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(float32=None))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    verdict, found = problems(pair)["transformers", "logits"]
    assert verdict == "fail"
    assert "transformers 5.23.0 does not open it: KeyError: 'Missing required keys'" in found


@pytest.mark.parametrize(
    "change, rule, verdict, engines, words",
    [
        ({"vocab_size": 520}, "vocabulary size", "fail", {"transformers"} | SERVERS, "target 512, draft 520"),
        ({"vocab_size": 520}, "vocabulary size", "warn", {"openvino", "llama.cpp"}, "target 512, draft 520"),
        ({"head_dim": 48}, "head size", "fail", {"vllm"}, "head_dim 48: taken by vLLM 0.33, not by older ones"),
        ({"head_dim": 48}, "head size", "warn", {"sglang", "llama.cpp"}, "head_dim 48"),
        ({"num_heads": 6, "num_kv_heads": 6, "head_dim": 64}, "heads", "fail", set(ENGINES[:4]), "256, 6 heads"),
        ({"family": "phi3", "sliding_window": 64}, "sliding window", "warn", {"llama.cpp", "sglang"}, "window 64"),
        ({"family": "mistral", "sliding_window": 64}, "sliding window", "warn", {"llama.cpp"}, "window 64"),
        ({"head_ids": tuple(range(128))}, "draft vocabulary", "fail", set(ENGINES), "proposes 128 of 512 tokens"),
        ({"intermediate_size": 1408}, "K-quants", "warn", {"llama.cpp"}, "intermediate_size 1408"),
        ({"num_layers": 20}, "size", "fail", set(ENGINES), "draft .* of .* parameters"),
        ({"num_heads": 2, "num_kv_heads": 2, "head_dim": 64}, "tensor parallelism", "warn", SERVERS, "not over 4"),
        ({"max_positions": 512}, "context", "fail", {"sglang"}, "target 2048, draft 512"),
        ({"max_positions": 512}, "context", "warn", set(ENGINES) - {"sglang"}, "target 2048, draft 512"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(clean, tmp_path, change, rule, verdict, engines, words):
    draft = write(tmp_path / "draft", dataclasses.replace(DRAFT, **change), clean / "tokenizer")
    found = [f for f in check_pair(clean / "target", draft) if (f.rule, f.verdict) == (rule, verdict)]
    assert {f.engine for f in found} == engines
    assert all(re.search(words, f.found) and f.remedy for f in found)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_can_be_asked_alone(clean, capsys, engine):
    pair = ["--target", str(clean / "target"), "--draft", str(clean / "draft")]
    assert main(["check", *pair, "--engine", engine]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line in ENGINES] == [engine]
    assert main(["check", *pair, "--engine", engine, "--engine", "vllm"]) == 0
    assert {line for line in capsys.readouterr().out.splitlines() if line in ENGINES} == {engine, "vllm"}


def test_phi3_without_its_sentencepiece_model_is_named(pair):
    (pair / "phi3-draft" / "tokenizer.model").unlink()
    verdict, found = problems(pair, "phi3-")["llama.cpp", "conversion"]
    assert verdict == "fail"
    assert "tokenizer.model is missing" in found


def test_an_untrained_draft_is_a_whole_folder(clean, tmp_path):
    export_untrained(clean / "target", "400K", tmp_path / "draft", dtype="bfloat16")
    config = load_config(tmp_path / "draft")
    assert config == dataclasses.replace(load_model(tmp_path / "draft")[0])
    assert problems(Path(shutil.copytree(clean / "target", tmp_path / "target")).parent).keys() == {
        ("llama.cpp", "K-quants"),
        ("sglang", "tensor parallelism"),
        ("vllm", "tensor parallelism"),
    }
    assert main(["export", "--untrained", "--target", str(clean / "target"), "--out", str(tmp_path / "x")]) == 2
    assert main(["export", "--untrained", "--out", str(tmp_path / "x")]) == 2
    assert main(["export", "--out", str(tmp_path / "x")]) == 2


def test_nothing_but_an_export_is_written_over(clean, tmp_path):
    target = Path(shutil.copytree(clean / "target", tmp_path / "target"))
    (target / "README.md").unlink()
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ConfigError, match="holds a model that no export wrote"):
        export_untrained(target, "400K", target)
    assert {path: path.read_bytes() for path in target.iterdir()} == before
    with pytest.raises(ConfigError, match="holds a model that no export wrote"):
        export_untrained(clean / "target", "400K", clean / "target")
    # An earlier export is, and nothing of its tokenizer stays.
    draft = tmp_path / "draft"
    export_untrained(target, "400K", draft)
    (draft / "chat_template.jinja").write_text("stale")
    export_untrained(target, "400K", draft)
    assert not (draft / "chat_template.jinja").exists()
    modes = {path.stat().st_mode & 0o777 for path in draft.iterdir() if path.suffix in (".json", ".safetensors")}
    assert len(modes - {(target / "tokenizer.json").stat().st_mode & 0o777}) <= 1
    assert (draft / "model.safetensors").stat().st_mode == (draft / "config.json").stat().st_mode


def test_inspect_tells_a_folder(clean, capsys, tmp_path):
    assert main(["inspect", str(clean / "phi3-draft")]) == 0
    out = capsys.readouterr().out
    assert "phi3" in out
    assert f"{dataclasses.replace(DRAFT, family='phi3').num_parameters:,}" in out
    assert "512 pieces, BOS 1, EOS 2, adds BOS" in out
    assert main(["inspect", str(tmp_path)]) == 2
    assert "neither config.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stories260K-hf", "llama2xs-hf", "babyllama-tok361-hf"])
def test_real_folders_are_told_and_checked(shared_data, name, capsys):
    folder = str(shared_data / "models" / name)
    assert main(["inspect", folder]) == 0
    assert main(["check", "--target", folder, "--draft", folder]) == 2
    assert "draft as large as its target" in capsys.readouterr().out
