"""Text, code and instructions that every machine already has: the running interpreter's own standard library.

Modules are read, never imported. A module belongs as a whole to one split by the hash of its name: "train" (13/16),
"seed" (2/16, prompts for `Generate`) or "eval" (1/16, prompts for `Evaluate`), so no held-out module is in the training
text; a held-out pair whose words a training module repeats is left out. The language reference in
`pydoc_data.topics` belongs to no module and is all training text. The same Python gives the same output. Where that is
too little, installed packages can be read in its place.
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import itertools
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jaxdraft.data.prompts import Prompt
from jaxdraft.data.quarantine import Rejected, first
from jaxdraft.errors import ConfigError
from jaxdraft.tokenizers import Tokenizer

Part = Literal["text", "code", "instructions"]
Kind = Literal["open", "summary", "code"]
Split = Literal["train", "seed", "eval"]

_LICENCE = "PSF-2.0"
_EXCLUDED = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "lib2to3", "encodings"}
_EXCLUDED |= {"pydoc_data", "ensurepip", "turtledemo", "__phello__", "__pycache__"}
_MACHINE = re.compile(r"^(_sysconfigdata|_sysconfig_vars|sitecustomize|usercustomize|python-config|pip|setuptools)")
_MAX_INPUT = 360  # characters of an instruction's input
_MAX_BODY_LINES, _MAX_BODY = 25, 800
_MAX_DESCRIPTION, _MAX_SUMMARY = 300, 120
_DISTINCTIVE = 80  # characters from which a held-out response equal to a training one counts as seen
_TEMPLATE = "### Instruction:\n{instruction}\n\n### Input:\n# {context}\n{text}\n\n### Response:\n"
_INSTRUCTIONS: dict[Kind, str] = {
    "open": "Describe this function.",
    "summary": "Summarize this code in one line.",
    "code": "Write the body of this function.",
}


@dataclass(frozen=True)
class _Module:
    name: str
    source: str
    split: Split


@dataclass(frozen=True)
class _Mined:
    """Of one module: its docstrings, and (qualified name, kind, input, response) of every pair."""

    docs: tuple[str, ...]
    pairs: tuple[tuple[str, Kind, str, str], ...]


@dataclass(frozen=True)
class _Example:
    kind: Kind
    name: str
    split: Split
    prompt: str
    response: str


@dataclass(frozen=True)
class PythonLibrary:
    """The standard library, or installed packages, as documents, in an order that mixes its parts.

    Attributes:
      part: "text" (a module's docstrings, and the language reference), "code" (source files) or "instructions" (prompt
        and response of `PythonTask`'s three kinds, one document each).
      split: which modules; see the module's docstring.
      limit: at most this many documents.
      licence: the standard library's; packages have their own, which nobody knows unless it is said here.
      packages: import names of installed packages, such as ``("numpy", "jax")``, to read instead of the standard
        library, for a recipe that wants each token once and more than the library's 2 MB of text. None is imported, and
        of modules with equal source the first is kept. Which text it is depends on the versions installed.
    Raises (when read):
      ConfigError: a package is not installed.
    """

    part: Part = "text"
    split: Split = "train"
    limit: int | None = None
    licence: str | None = _LICENCE
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("part", self.part, get_args(Part))
        _check_choice("split", self.split, get_args(Split))

    def documents(self) -> Iterator[str | Rejected]:
        modules = [module for module in _modules(self.packages) if module.split == self.split]
        if self.part == "code":
            documents = iter([module.source for module in modules])
        elif self.part == "text":
            topics = _topics() if self.split == "train" and not self.packages else {}
            texts = [*topics.items(), *_texts(modules)]
            documents = iter([doc for _, doc in sorted(texts, key=lambda item: _order(item[0]))])
        else:
            examples = (example for example in _examples(self.packages) if example.split == self.split)
            documents = (example.prompt + example.response for example in examples)
        return first(documents, self.limit)

    def fingerprint(self) -> str:
        """sha256 over the Python version and the names and contents of the files read."""
        return _library_fingerprint(self.packages)

    def provenance(self) -> dict[str, Any]:
        return {"licence": None} if self.packages and self.licence == _LICENCE else {}


@dataclass(frozen=True)
class PythonTask:
    """Prompts made from the standard library, with what its authors wrote as reference.

    "open" asks for a function's description from its signature (mirrors an open-ended task), "summary" for the first
    docstring line of a class or module from its outline, "code" for a short body from signature and docstring.

    Attributes:
      kind: one of the three, or "all" of them mixed.
      split: "seed" for `Generate`, "eval" for `Evaluate`; no text of either is in the "train" documents.
      limit: at most this many prompts, spread over the library.
      max_tokens: a longer prompt is rejected.
    """

    kind: Literal["open", "summary", "code", "all"] = "all"
    split: Split = "eval"
    limit: int | None = None
    max_tokens: int = 160

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, (*get_args(Kind), "all"))
        _check_choice("split", self.split, get_args(Split))

    def prompts(self, tokenizer: Tokenizer) -> Iterator[Prompt | Rejected]:
        examples = [e for e in _examples(()) if e.split == self.split and self.kind in (e.kind, "all")]
        tokens = tokenizer.encode_batch([e.prompt for e in examples])

        def each() -> Iterator[Prompt | Rejected]:
            for example, ids in zip(examples, tokens, strict=True):
                name = f"{example.kind}:{example.name}"
                if len(ids) > self.max_tokens:
                    yield Rejected(name, f"more than {self.max_tokens} tokens")
                else:
                    yield Prompt(name, tuple(ids), example.prompt, example.response, extra={"task": example.kind})

        return first(each(), self.limit)

    def fingerprint(self) -> str:
        return _library_fingerprint(())


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(choices)}")


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _split_of(module: str) -> Split:
    bucket = int(_order(module)[:2], 16) % 16
    return "eval" if bucket == 0 else "seed" if bucket <= 2 else "train"


def _roots(packages: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """(package, its folder); the standard library's package is ""."""
    if not packages:
        yield "", Path(sysconfig.get_path("stdlib"))
    for package in packages:
        # Of a name with a dot, find_spec would import the parent.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"packages: {package!r} is not the import name of an installed package: pip install the one that has "
                "it, or leave it out"
            )
        for folder in spec.submodule_search_locations:
            yield package, Path(folder)


def _files(packages: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(module name, file), in the order of the names' hashes."""
    found = []
    for package, root in _roots(packages):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            folders = {part for part in parts if part in _EXCLUDED or part.startswith(("config-", "lib-"))}
            if not folders and (package or not _MACHINE.match(parts[-1])):
                found.append((".".join(part for part in (package, *parts) if part not in ("", "__init__")), path))
    return sorted(found, key=lambda item: _order(item[0]))


@functools.cache
def _modules(packages: tuple[str, ...]) -> tuple[_Module, ...]:
    modules = []
    seen: set[str] = set()
    for name, path in _files(packages):
        try:
            source = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if packages and source in seen:  # several __init__.py of nothing but a licence
            continue
        seen.add(source)
        modules.append(_Module(name, source, _split_of(name)))
    return tuple(modules)


@functools.cache
def _topics() -> dict[str, str]:
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            topics: dict[str, str] = ast.literal_eval(node.value)
            named = {inspect.cleandoc(text): name for name, text in sorted(topics.items())}  # some have two names
            return {name: text for text, name in named.items()}
    return {}


@functools.cache
def _library_fingerprint(packages: tuple[str, ...]) -> str:
    digest = hashlib.sha256(sys.version.encode())
    for module in _modules(packages):
        digest.update(f"{module.name}\0{hashlib.sha256(module.source.encode()).hexdigest()}\n".encode())
    if not packages:
        digest.update(repr(sorted(_topics().items())).encode())
    return digest.hexdigest()


def _texts(modules: list[_Module]) -> Iterator[tuple[str, str]]:
    for module in modules:
        if docs := _mined(module).docs:
            yield module.name, "\n\n\n".join(docs) + "\n"


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def _mined(module: _Module) -> _Mined:
    try:
        tree = ast.parse(module.source)
    except SyntaxError:  # files that are wrong on purpose
        return _Mined((), ())
    lines = module.source.splitlines()
    documented = [(name, node, doc) for name, node in _walk(module.name, tree) if (doc := ast.get_docstring(node))]
    return _Mined(
        docs=tuple(f"{name}\n\n{doc}" for name, _, doc in documented),
        pairs=tuple((name, *pair) for name, node, doc in documented for pair in _pairs(node, doc, lines)),
    )


def _walk(name: str, tree: ast.Module) -> Iterator[tuple[str, _Definition]]:
    """(qualified name, node) of a module, its functions and classes, in order of the source."""

    def below(prefix: str, body: list[ast.stmt]) -> Iterator[tuple[str, _Definition]]:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}.{node.name}"
                yield name, node
                if isinstance(node, ast.ClassDef):
                    yield from below(name, node.body)

    yield name, tree
    yield from below(name, tree.body)


@functools.cache
def _examples(packages: tuple[str, ...]) -> tuple[_Example, ...]:
    """Every pair, in mixed order. Training modules come first, so that a held-out repetition of theirs is dropped."""
    ranks = {"train": 0, "seed": 1, "eval": 2}
    found: dict[str, _Example] = {}
    seen: set[tuple[str, str, str]] = set()
    for module in sorted(_modules(packages), key=lambda module: ranks[module.split]):
        for name, kind, text, response in _mined(module).pairs:
            answered = module.split != "train" and len(response) >= _DISTINCTIVE and (kind, "", response) in seen
            if answered or (kind, text, response) in seen or f"{kind}:{name}" in found:
                continue
            seen |= {(kind, text, response), (kind, "", response)}
            context = name if name == module.name else name.rpartition(".")[0]
            prompt = _TEMPLATE.format(instruction=_INSTRUCTIONS[kind], context=context, text=text)
            found[f"{kind}:{name}"] = _Example(kind, name, module.split, prompt, response)
    return tuple(found[key] for key in sorted(found, key=_order))


def _pairs(node: _Definition, doc: str, lines: list[str]) -> Iterator[tuple[Kind, str, str]]:
    """(kind, input, response) of one documented definition, within the bounds of length; `lines` are the module's."""
    if isinstance(node, ast.Module | ast.ClassDef):
        summary = doc.split("\n\n")[0].replace("\n", " ").strip()
        outline = _outline(node)
        if outline and 15 <= len(summary) <= _MAX_SUMMARY:
            yield "summary", outline, summary + "\n"
        return
    first, *rest = node.body
    if first.lineno == node.lineno:  # def f(): "doc"
        return
    signature = _dedent(lines[node.lineno - 1 : first.lineno - 1])
    description = doc.split("\n\n")[0]
    if len(signature) <= _MAX_INPUT and 20 <= len(description) <= _MAX_DESCRIPTION:
        yield "open", signature, description + "\n"
    given = _dedent(lines[node.lineno - 1 : first.end_lineno])
    if rest and node.end_lineno is not None and first.end_lineno is not None:
        body_lines = lines[first.end_lineno : node.end_lineno]
        body = textwrap.indent(_dedent(body_lines), "    ")
        if len(given) <= _MAX_INPUT and len(body_lines) <= _MAX_BODY_LINES and 20 <= len(body) <= _MAX_BODY:
            yield "code", given, body + "\n"


def _outline(node: ast.Module | ast.ClassDef) -> str:
    """What a module or class defines, one name or signature per line, as many as fit."""
    lines: list[str] = []
    indent = ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        lines, indent = [f"class {node.name}({bases}):" if bases else f"class {node.name}:"], "    "
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = ", ".join(a.arg for a in (*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs))
            lines.append(f"{indent}def {child.name}({arguments})")
        elif isinstance(child, ast.ClassDef):
            lines.append(f"{indent}class {child.name}")
    size = itertools.accumulate(len(line) + 1 for line in lines)
    return "\n".join(line for line, end in zip(lines, size, strict=True) if end <= _MAX_INPUT) if len(lines) > 1 else ""


def _dedent(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines)).strip("\n")
