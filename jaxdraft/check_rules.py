"""The rules of ``jaxdraft check``: each looks at the two folders once and yields findings for the engines it concerns.

They are those that transformers 4.44 and 5, vLLM, SGLang, OpenVINO GenAI and llama.cpp apply, or trip over, when they
load a draft model. Seen in running them: transformers 4.44.2, 4.57.6, 5.5.4 and 5.23.0, OpenVINO GenAI 2026.4.1,
llama.cpp at 0c1e570. Read in their sources: vLLM 0.33.0, SGLang 0.5.23.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from safetensors import safe_open

from jaxdraft import untrusted
from jaxdraft.models import ModelConfig
from jaxdraft.models.decoder import Params
from jaxdraft.models.folder import D2T, read_json, weight_files
from jaxdraft.models.hf import check_weights, load_config, load_model
from jaxdraft.tokenizer_backends import read_sentencepiece
from jaxdraft.tokenizers import Tokenizer, differences, load_tokenizer, tokenizer_files

ENGINES = ("transformers", "vllm", "sglang", "openvino", "llama.cpp")
SERVERS = ("vllm", "sglang")
# FlashAttentionBackend.get_supported_head_sizes of vLLM at commit 0084b783; 0.33.0 takes every multiple of 8 up to 256.
_HEAD_SIZES = (32, 64, 96, 128, 160, 192, 224, 256)
_LLAMACPP_VOCAB_SLACK = 128  # SPEC_VOCAB_MAX_SIZE_DIFFERENCE of its common/speculative.cpp
_LLAMACPP_FIRST_COMPARED = 5  # SPEC_VOCAB_CHECK_START_TOKEN_ID
_K_QUANT_BLOCK, _QUANT_BLOCK = 256, 32
_TENSOR_PARALLEL = (2, 4, 8)

Verdict = Literal["ok", "warn", "fail", "skip"]


class Pair:
    """The two folders, read when first asked for.

    Raises:
      ConfigError: from any attribute whose file is missing or unreadable.
    """

    def __init__(self, target: Path, draft: Path):
        self.folders = target, draft

    @cached_property
    def raw(self) -> list[dict[str, Any]]:
        return [read_json(folder / "config.json") for folder in self.folders]

    @cached_property
    def configs(self) -> list[ModelConfig]:
        return [load_config(folder) for folder in self.folders]

    @cached_property
    def tokenizers(self) -> list[Tokenizer]:
        return [load_tokenizer(folder) for folder in self.folders]

    @cached_property
    def draft_model(self) -> tuple[ModelConfig, Params]:
        return load_model(self.folders[1])

    @property
    def draft(self) -> ModelConfig:
        return self.configs[1]


Result = tuple[Sequence[str], Verdict, str, str]  # engines, verdict, found, remedy


def _vocabulary(pair: Pair) -> Iterator[Result]:
    target, draft = (config.vocabulary for config in pair.configs)
    found, remedy = f"target {target}, draft {draft}", "export the draft with the target's vocab_size"
    same = target == draft
    yield ("transformers", *SERVERS), "ok" if same else "fail", found, remedy
    yield ("openvino",), "ok" if same else "warn", found if same else f"{found}: not compared", remedy
    near = abs(target - draft) <= _LLAMACPP_VOCAB_SLACK
    yield ("llama.cpp",), "ok" if target == draft else "warn" if near else "fail", found, remedy


def _draft_vocabulary(pair: Pair) -> Iterator[Result]:
    if pair.draft.head_ids is not None:
        found = f"the head proposes {len(pair.draft.head_ids)} of {pair.draft.vocabulary} tokens, by a map {D2T}"
        yield ENGINES, "fail", found, "no engine reads that of a whole model: export with --vocabulary full"


def _pieces(pair: Pair) -> Iterator[Result]:
    found = differences(*pair.tokenizers)
    remedy = "copy the target's tokenizer files into the draft's folder, and train it on them if it was not"
    if not found:
        yield ENGINES, "ok", f"{pair.tokenizers[0].vocab_size} pieces, BOS, EOS and add_bos are the same", ""
    ours, theirs = (tokenizer.pieces() for tokenizer in pair.tokenizers)
    end = min(config.vocabulary for config in pair.configs)
    compared = slice(_LLAMACPP_FIRST_COMPARED, end)
    for i, difference in enumerate(found):
        if difference.startswith("EOS"):
            yield ENGINES[:4], "fail", difference, remedy
            yield ("llama.cpp",), "warn", f"{difference}; llama.cpp compares them only where EOS is added", remedy
        elif i == 0 and ours != theirs and ours[compared] == theirs[compared]:  # the first is then the one on pieces
            yield ENGINES[:4], "fail", difference, remedy
            difference += f"; llama.cpp compares ids {_LLAMACPP_FIRST_COMPARED} to {end - 1} only"
            yield ("llama.cpp",), "warn", difference, remedy
        else:
            yield ENGINES, "fail", difference, remedy


def _converted_pieces(pair: Pair) -> Iterator[Result]:
    target, draft = (_stored_pieces(tokenizer) for tokenizer in pair.tokenizers)
    compared = range(_LLAMACPP_FIRST_COMPARED, min(len(target), len(draft)))
    apart = [i for i in compared if target[i] != draft[i]]
    if apart:
        i = apart[0]
        found = f"converted, id {i} is {target[i]!r} in the target and {draft[i]!r} in the draft ({len(apart)} differ)"
        remedy = "copy the target's tokenizer files; of a Llama llama.cpp converts tokenizer.model where there is one"
        yield ("llama.cpp",), "fail", found, remedy


def _stored_pieces(tokenizer: Tokenizer) -> list[str]:
    path = tokenizer.folder / "tokenizer.model"
    if not path.is_file():
        return tokenizer.pieces()
    model = read_sentencepiece(path)
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


def _vocab_type(pair: Pair) -> Iterator[Result]:
    target, draft = (_stored_vocab(tokenizer.folder) for tokenizer in pair.tokenizers)
    found, remedy = (
        f"converted, target {target}, draft {draft}",
        "copy the target's tokenizer files, tokenizer.model too",
    )
    yield ("llama.cpp",), "ok" if target == draft else "fail", found, remedy


def _stored_vocab(folder: Path) -> str:
    """What llama.cpp's converter makes of a Llama's tokenizer: of a tokenizer.json, SPM only with byte fallback."""
    if (folder / "tokenizer.model").is_file():
        return "SPM"
    raw = untrusted.read_json(folder / "tokenizer.json", limit=untrusted.TOKENIZER_BYTES)
    model, decoder = raw.get("model") or {}, raw.get("decoder") or {}
    as_spm = model.get("type") == "BPE" and model.get("byte_fallback") and decoder.get("type") == "Sequence"
    return "SPM" if as_spm else "BPE"


def _tokenizer_files(pair: Pair) -> Iterator[Result]:
    ours, theirs = ({f.name: f.read_bytes() for f in tokenizer_files(folder)} for folder in pair.folders)
    changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if changed:
        yield ENGINES, "warn", f"differ: {', '.join(changed)}", "copy the target's tokenizer files byte for byte"
    else:
        yield ENGINES, "ok", f"the target's, byte for byte: {', '.join(sorted(ours))}", ""


def _special_ids(pair: Pair) -> Iterator[Result]:
    target, draft = pair.configs
    remedy = "export the draft with the target's bos_token_id and eos_token_id"
    for name in ("bos_id", "eos_ids"):
        ours, theirs = getattr(target, name), getattr(draft, name)
        if ours == theirs:
            yield ENGINES, "ok", f"config.json: {name} {ours}", ""
            continue
        yield ENGINES, "warn", f"config.json: {name} is {ours} in the target, {theirs} in the draft", remedy


def _pad(pair: Pair) -> Iterator[Result]:
    yield _same_setting(pair, "pad_token", "openvino")


def _added_tokens(pair: Pair) -> Iterator[Result]:
    yield _same_setting(pair, "add_bos_token", "llama.cpp")
    yield _same_setting(pair, "add_eos_token", "llama.cpp")


def _same_setting(pair: Pair, key: str, engine: str) -> Result:
    paths = [folder / "tokenizer_config.json" for folder in pair.folders]
    target, draft = (read_json(path).get(key) if path.is_file() else None for path in paths)
    found, remedy = f"{key}: target {target}, draft {draft}", "copy the target's tokenizer_config.json"
    return (engine,), "ok" if target == draft else "fail", found, remedy


def _convertible(pair: Pair) -> Iterator[Result]:
    for folder, raw in zip(pair.folders, pair.raw, strict=True):
        if raw.get("model_type") != "phi3":
            continue
        there = (folder / "tokenizer.model").is_file()
        found = f"{folder.name}: tokenizer.model is {'there' if there else 'missing'}, llama.cpp converts Phi-3 with it"
        yield ("llama.cpp",), "ok" if there else "fail", found, "put the target's tokenizer.model into the folder"


def _head_size(pair: Pair) -> Iterator[Result]:
    size = pair.draft.head_size
    found, remedy = f"head_dim {size}", "give the draft heads of 64 or 128 (ModelConfig.for_target does)"
    usual = size in _HEAD_SIZES
    older = "" if usual or size % 8 or size > 256 else ": taken by vLLM 0.33, not by older ones"
    yield ("vllm",), "ok" if usual else "fail", f"{found}{older}", remedy
    yield ("sglang",), "ok" if usual else "warn", found if usual else f"{found}: depends on its attention", remedy
    yield ("llama.cpp",), "ok" if size % 32 == 0 else "warn", f"{found}: quantised caches need a multiple of 32", remedy


def _head_count(pair: Pair) -> Iterator[Result]:
    draft = pair.draft
    odd = draft.family == "llama" and draft.hidden_size % draft.num_heads
    found = f"hidden_size {draft.hidden_size}, {draft.num_heads} heads"
    remedy = "transformers 5 refuses a Llama whose heads do not divide hidden_size: take a number that does"
    yield ENGINES[:4], "fail" if odd else "ok", found, remedy


def _window(pair: Pair) -> Iterator[Result]:
    draft = pair.draft
    if draft.sliding_window is None or draft.sliding_window >= draft.max_positions:
        return
    found = f"sliding_window {draft.sliding_window}: ignored, past it the draft is another model"
    remedy = "train the draft without a window, or keep texts shorter than it"
    yield ("llama.cpp",), "warn", found, remedy
    if draft.family == "phi3":
        yield ("sglang",), "warn", found, remedy


def _k_quants(pair: Pair) -> Iterator[Result]:
    draft = pair.draft
    rows = {
        "hidden_size": draft.hidden_size,
        "intermediate_size": draft.intermediate_size,
        "heads x head_dim": draft.num_heads * draft.head_size,
    }
    odd = [f"{name} {value}" for name, value in rows.items() if value % _K_QUANT_BLOCK]
    if odd:
        found = f"{', '.join(odd)}: K-quants need rows that {_K_QUANT_BLOCK} divides, and fall back to larger types"
        plain = "F16" if any(value % _QUANT_BLOCK for value in rows.values()) else "F16 or Q8_0"
        yield ("llama.cpp",), "warn", found, f"convert to {plain}, not to a K-quant such as Q4_K_M"
    else:
        yield ("llama.cpp",), "ok", "every row divides into K-quant blocks of 256", ""


def _weights(pair: Pair) -> Iterator[Result]:
    check_weights(pair.folders[0])
    config, params = pair.draft_model
    if bad := [path for path, x in jax.tree_util.tree_leaves_with_path(params) if not np.isfinite(x).all()]:
        name = jax.tree_util.keystr(bad[0], simple=True, separator=".")
        yield ENGINES, "fail", f"{pair.folders[1].name}: {name} holds numbers that are not finite", "train it anew"
    else:
        yield ENGINES, "ok", f"every tensor is there; {config.num_parameters:,} finite numbers in the draft", ""


def _metadata(pair: Pair) -> Iterator[Result]:
    for file in weight_files(pair.folders[1]):
        with safe_open(file, framework="numpy") as opened:
            tagged = (opened.metadata() or {}).get("format") == "pt"
        found = f"{file.name}: metadata format is {'pt' if tagged else 'missing'}"
        remedy = "transformers 4 cannot open it: write it again with `jaxdraft export`"
        yield ("transformers",), "ok" if tagged else "fail", found, remedy


def _rope_dialects(pair: Pair) -> Iterator[Result]:
    readers = ("transformers", "vllm", "sglang", "llama.cpp")
    for folder, raw, config in zip(pair.folders, pair.raw, pair.configs, strict=True):
        theta, old, new = config.rope_theta, raw.get("rope_scaling"), raw.get("rope_parameters") or {}
        lost = []
        if raw.get("rope_theta") is None and theta != 10000.0:
            lost.append(f"rope_theta {theta:g} only in {'rope_scaling' if old else 'rope_parameters'}")
        if config.rope_scaling is not None and not old:
            lost.append(f"rope scaling {new.get('rope_type')} only in rope_parameters")
        if lost:
            found = f"{folder.name}: {', '.join(lost)}: transformers 4 does not look there"
            remedy = f"add rope_theta and rope_scaling to {folder.name}/config.json, as `jaxdraft export` writes them"
            yield readers, "fail", found, remedy
        else:
            yield readers, "ok", f"{folder.name}: rope_theta {theta:g}, read alike by transformers 4 and 5", ""


def _size(pair: Pair) -> Iterator[Result]:
    target, draft = (config.num_parameters for config in pair.configs)
    found = f"draft {draft:,} of {target:,} parameters ({draft / target:.1%})"
    verdict: Verdict = "fail" if draft >= target else "warn" if draft > target / 4 else "ok"
    remedy = "a draft as large as its target cannot speed it up: take at most a tenth (ModelConfig.for_target)"
    yield ENGINES, verdict, found, remedy


def _context(pair: Pair) -> Iterator[Result]:
    target, draft = (config.max_positions for config in pair.configs)
    found = f"max_position_embeddings: target {target}, draft {draft}"
    if draft >= target:
        yield ENGINES, "ok", found, ""
        return
    yield ("sglang",), "fail", f"{found}: it gives the draft the target's", f"start it with --context-length {draft}"
    yield ("vllm",), "warn", f"{found}: it limits both", "train the draft for the target's context"
    others = f"{found}: past them it will hardly be accepted"
    yield ("transformers", "openvino", "llama.cpp"), "warn", others, "train the draft for the target's context"


def _generation(pair: Pair) -> Iterator[Result]:
    path = pair.folders[1] / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    wanted = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    off = [name for name, value in wanted.items() if settings.get(name) != value]
    off += [] if "num_assistant_tokens" in settings else ["num_assistant_tokens"]
    if off:
        found = f"generation_config.json leaves {', '.join(off)} at transformers' defaults (20 tokens, 0.4)"
        yield ("transformers",), "warn", found, "write it with `jaxdraft export --block-size`"
    else:
        yield ("transformers",), "ok", f"assisted generation proposes {settings['num_assistant_tokens']} tokens", ""


def _parallel(pair: Pair) -> Iterator[Result]:
    target, draft = pair.configs
    lost = [str(n) for n in _TENSOR_PARALLEL if _splits(target, n) and not _splits(draft, n)]
    if lost:
        found = (
            f"{draft.num_heads} heads, {draft.num_kv_heads} for keys and values: not over {' or '.join(lost)} devices"
        )
        yield SERVERS, "warn", found, "they split a draft as its target: give it heads that split (for_target does)"
    else:
        yield SERVERS, "ok", "heads split over as many devices as the target's", ""


def _splits(config: ModelConfig, devices: int) -> bool:
    """vLLM splits query heads evenly, and splits key and value heads evenly or repeats them evenly."""
    keys = config.num_kv_heads
    return config.num_heads % devices == 0 and (keys % devices == 0 or devices % keys == 0)


def _pickles(pair: Pair) -> Iterator[Result]:
    for folder in pair.folders:
        if names := sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model")):
            found = f"{folder.name}: {', '.join(names)} can run code when loaded"
            yield ENGINES, "warn", found, "delete it: the weights are in the safetensors files"


def _code(pair: Pair) -> Iterator[Result]:
    for folder, raw in zip(pair.folders, pair.raw, strict=True):
        if "auto_map" in raw:
            found = f"{folder.name}: config.json names code of its own (auto_map)"
            yield ENGINES, "warn", found, "remove auto_map: the architecture is built into every engine"


def _logits(pair: Pair) -> Iterator[Result]:
    try:
        import torch
        import transformers
    except ImportError:
        yield ("transformers",), "skip", "torch is not installed here: logits were not compared", ""
        return
    import jax.numpy as jnp

    from jaxdraft.models import Decoder, head_weight, logits

    config, params = pair.draft_model
    tokens = np.arange(32)[None] * 37 % config.vocabulary
    hidden = Decoder(config, dtype=jnp.float32).apply({"params": params}, tokens, np.arange(32)[None])
    ours = np.asarray(logits(hidden, head_weight(config, params)))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(pair.folders[1], dtype=torch.float32)
    except Exception as error:  # whatever it may raise, it is what a user of the draft would see
        found = f"transformers {transformers.__version__} does not open it: {type(error).__name__}: {error}"
        yield ("transformers",), "fail", found, "write it again with `jaxdraft export`"
        return
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    apart, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    verdict: Verdict = "ok" if apart <= 1e-4 * max(1.0, largest) else "fail"
    found = f"transformers {transformers.__version__} and jaxdraft differ by at most {apart:.1e} of {largest:.1f}"
    yield ("transformers",), verdict, found, "report it with the folder's config.json: the two must agree"


RULES: dict[str, Callable[[Pair], Iterator[Result]]] = {
    "vocabulary size": _vocabulary,
    "draft vocabulary": _draft_vocabulary,
    "tokenizer": _pieces,
    "vocab type": _vocab_type,
    "tokenizer files": _tokenizer_files,
    "special ids": _special_ids,
    "converted pieces": _converted_pieces,
    "added tokens": _added_tokens,
    "pad token": _pad,
    "conversion": _convertible,
    "head size": _head_size,
    "heads": _head_count,
    "sliding window": _window,
    "K-quants": _k_quants,
    "weights": _weights,
    "safetensors format": _metadata,
    "rope dialects": _rope_dialects,
    "size": _size,
    "context": _context,
    "assisted generation": _generation,
    "tensor parallelism": _parallel,
    "pickled weights": _pickles,
    "own code": _code,
    "logits": _logits,
}
