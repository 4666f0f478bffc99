"""What may import what, read from the source: the parts of the package can be understood one at a time."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxdraft"
MODULES = sorted(PACKAGE.rglob("*.py"))
LINES = 400
HEAVY = {"matplotlib", "tensorflow", "tensorflow_datasets", "torch", "transformers"}

# part -> the parts it may import, besides itself and `errors`. A new part has to be given its place here.
BASE = {"backend", "distributed", "files", "fingerprint", "huggingface", "redaction", "remote", "settings", "sharding"}
BASE |= {"stopping", "tokenizer_backends", "tokenizers", "tracking", "untrusted"}
BELOW_STAGES = BASE | {"checkpoint", "data", "decode", "evaluate", "losses", "models", "server", "train"}
MAY_IMPORT = {
    "__init__": set(),
    "errors": set(),
    "files": set(),
    "redaction": set(),
    "untrusted": set(),
    "arguments": set(),
    "user_code": set(),
    "backend": set(),
    "huggingface": set(),
    "distributed": set(),
    "fingerprint": {"distributed"},
    "provenance": {"__init__"},
    "sharding": {"distributed"},
    "tokenizer_backends": {"untrusted"},
    "tokenizers": {"tokenizer_backends", "untrusted"},
    "tokenizer_training": {"tokenizers"},
    "tracking": {"distributed", "redaction", "untrusted"},
    "stopping": {"distributed"},
    "file_hashes": {"files"},
    "checkpoint": {"distributed", "file_hashes", "fingerprint", "remote", "settings", "sharding"},
    "remote": {"tracking"},
    "lease": {"remote", "tracking"},
    "home": {"lease", "remote", "untrusted"},
    "data": {"files", "huggingface", "remote", "tokenizers", "untrusted"},
    "server": {"data", "redaction", "tokenizers"},
    "losses": {"backend", "user_code"},
    "models": BASE,
    "decode": BASE | {"models"},
    "train": BASE | {"checkpoint", "data", "losses", "models"},
    "evaluate": BASE | {"__init__", "data", "decode", "models", "user_code"},
    "settings": set(),
    "overrides": {"losses"},
    "recipe_data": {"decode"},
    "recipe_stages": BELOW_STAGES | {"recipe_data", "server"},
    "recipe": BELOW_STAGES | {"recipe_data", "recipe_stages"},
    "recipe_file": {"overrides", "recipe"},
    "licences": BELOW_STAGES | {"home", "recipe"},
    "export": BELOW_STAGES | {"__init__", "licences"},
    "past_drafts": BELOW_STAGES | {"export", "home"},
    "check_rules": BELOW_STAGES,
    "check": {"check_rules"},
    "inspect": BELOW_STAGES,
    "inspect_rows": BELOW_STAGES | {"home", "inspect"},
    "verify": BELOW_STAGES | {"file_hashes", "home", "inspect", "provenance", "settings"},
    "diff": BELOW_STAGES | {"home", "inspect", "provenance", "settings", "verify"},
    "context": BELOW_STAGES | {"export", "home", "recipe"},
    "early_checks": BELOW_STAGES | {"context", "recipe"},
    "stored_targets": BELOW_STAGES | {"context", "recipe"},
    "data_stages": BELOW_STAGES | {"context", "recipe", "settings", "stored_targets", "tokenizer_training"},
    "prepare": BELOW_STAGES | {"context", "data_stages", "recipe", "settings"},
    "questions": BELOW_STAGES | {"context", "recipe"},
    "answers": BELOW_STAGES | {"questions"},
    "generation": BELOW_STAGES
    | {"answers", "context", "data_stages", "questions", "recipe", "server", "settings", "stored_targets"},
    "probe": BELOW_STAGES | {"context", "recipe"},
    "stages": BELOW_STAGES
    | {
        "home",
        "context",
        "data_stages",
        "export",
        "generation",
        "past_drafts",
        "prepare",
        "probe",
        "recipe",
        "settings",
        "stored_targets",
    },
    "run": BELOW_STAGES
    | {"context", "early_checks", "export", "home", "licences", "provenance", "recipe", "settings", "stages"},
    "replay": BELOW_STAGES | {"context", "diff", "home", "provenance", "recipe", "run", "settings", "stages"},
    "plan": BELOW_STAGES | {"context", "home", "licences", "recipe", "recipe_file", "stored_targets"},
    "cli_sample": BELOW_STAGES,
    "cli_runs": BELOW_STAGES
    | {"arguments", "diff", "home", "inspect", "inspect_rows", "recipe_file", "replay", "verify"},
    "cli": BELOW_STAGES
    | {
        "__init__",
        "arguments",
        "check",
        "cli_runs",
        "cli_sample",
        "export",
        "home",
        "licences",
        "past_drafts",
        "plan",
        "recipe_file",
        "run",
    },
}


class Import(NamedTuple):
    module: str  # absolute; for `from a import b`, "a.b"
    line: int
    at_import_time: bool  # runs when the module is imported: not in a function, not for the type checker alone


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import statement of a module's source, wherever it stands."""

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import_time)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            keep = len(parents) - node.level + is_package
            base = ".".join([*(parents[:keep] if node.level else []), *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_import_time)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_import_time)
        else:
            in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import_time and not in_function)

    return visit(ast.parse(source), True)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> list[Import]:
    return list(imports(path.read_text(), name_of(path), path.name == "__init__.py"))


def part(module: str) -> str:
    """The first name below the package: "jaxdraft.models.hf" -> "models". A name of the package itself: "__init__"."""
    name = module.split(".")[1] if "." in module else "__init__"
    return name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() else "__init__"


def breaks(path: Path, forbidden) -> list[str]:
    """Where a module holds an import for which `forbidden` is true, as lines for the failure message."""
    where = path.relative_to(PACKAGE.parent)
    return [f"{where}:{found.line} imports {found.module}" for found in imports_of(path) if forbidden(found)]


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


def test_imports_are_read_wherever_they_stand():
    source = """
import a.b as c
from . import near
from ..up import thing
try:
    import d
except ImportError:
    pass
if TYPE_CHECKING:
    import e
def f():
    from g import h
class C:
    import i
"""
    at_import_time = {"a.b": True, "p.q.near": True, "p.up.thing": True, "d": True, "e": False, "g.h": False, "i": True}
    assert {found.module: found.at_import_time for found in imports(source, "p.q.r")} == at_import_time
    assert [found.module for found in imports("from .x import y", "p.q", is_package=True)] == ["p.q.x.y"]


def test_the_directions_have_no_cycle():
    order: list[str] = []
    waiting = dict(MAY_IMPORT)
    while waiting:
        ready = sorted(name for name, allowed in waiting.items() if allowed <= set(order))
        assert ready, f"these import each other: {sorted(waiting)}"
        order += ready
        waiting = {name: allowed for name, allowed in waiting.items() if name not in ready}


@each_module
def test_imports_point_downwards(path):
    here = part(name_of(path))
    assert here in MAY_IMPORT, f"{here} has no place in MAY_IMPORT yet"
    allowed = MAY_IMPORT[here] | {here, "errors"}
    assert not breaks(path, lambda found: is_in(found.module, "jaxdraft") and part(found.module) not in allowed)


@each_module
def test_nothing_heavy_is_imported_with_the_package(path):
    assert not breaks(path, lambda found: found.at_import_time and is_in(found.module, *HEAVY))


@each_module
def test_no_private_jax(path):
    assert not breaks(path, lambda found: is_in(found.module, "jax._src"))
    assert "jax._src" not in path.read_text()


@each_module
def test_only_checkpoint_knows_orbax(path):
    assert path.name == "checkpoint.py" or not breaks(path, lambda found: is_in(found.module, "orbax"))


@each_module
def test_a_module_can_be_read_in_one_sitting(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LINES, f"{path.relative_to(PACKAGE.parent)} has {lines} lines, more than {LINES}: split it"


@pytest.mark.parametrize("path", [path for path in MODULES if part(name_of(path)) == "data"], ids=name_of)
def test_data_knows_no_jax(path):
    assert not breaks(path, lambda found: is_in(found.module, "flax", "jax", "jaxlib", "optax"))


@pytest.mark.parametrize("path", [path for path in MODULES if part(name_of(path)) == "losses"], ids=name_of)
def test_losses_know_jax_only(path):
    known = sys.stdlib_module_names | {"jax", "jaxdraft", "numpy"}
    assert not breaks(path, lambda found: found.module.split(".")[0] not in known)


def test_importing_jaxdraft_loads_no_other_framework():
    program = f"""
import importlib, sys
for name in {[name_of(path) for path in MODULES if path.name != "__main__.py"]}:
    importlib.import_module(name)
    loaded = {HEAVY} & sys.modules.keys()
    assert not loaded, f"importing {{name}} loads {{sorted(loaded)}}"
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
