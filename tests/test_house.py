"""The house rules that a machine can hold: names, imports, versions, pages that say what is true."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import halve
from halve.cli.app import app

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

PUBLIC = [
    *("Anatomy", "Arch", "Checkpoint", "HalveError", "Plan", "Proof", "Recipe", "Scores", "__version__"),
    *("check", "discover", "forecast", "load_config", "load_recipe", "prove", "run", "select", "trim"),
]


# ---- public names


def test_public_names_are_these() -> None:
    assert halve.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(halve, name)
    assert name in dir(halve)
    assert name == "__version__" or value.__doc__


def test_what_the_type_checker_sees_is_what_is_loaded() -> None:
    tree = ast.parse((ROOT / "src/halve/__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == halve._HOMES
    assert sorted([*seen, "__version__"]) == halve.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        halve.prnue  # type: ignore[attr-defined]  # noqa: B018


WITHOUT_TORCH = ["halve", "halve.cli", "halve.pipeline.run", "halve.recipe.schema", "halve.report.page"]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_it_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_version_is_one() -> None:
    assert halve.__version__ == PROJECT["project"]["version"] == version("halve")
    assert f"## {halve.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_types_are_shipped() -> None:
    assert (ROOT / "src/halve/py.typed").exists()


# ---- what is installed


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {canonicalize_name(r.name): str(r.specifier) for r in requirements}
    assert all(re.fullmatch(r"==[\w.]+", pin) for pin in found.values()), "exact, without a local part such as +cpu"
    return {name: pin.removeprefix("==") for name, pin in found.items()}


def test_the_tested_torch_is_pinned() -> None:
    assert pinned()["torch"] == "2.13.0"


def test_every_direct_dependency_is_pinned_inside_its_range() -> None:
    project, pins = PROJECT["project"], pinned()
    direct = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for requirement in map(Requirement, direct):
        if requirement.name == "halve":
            continue
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), requirement


PRIVATE_TORCH = re.compile(r"\b(?:from|import) torch[\w.]*\._|\btorch(?:\.\w+)*\._[a-z]")


def test_torch_is_bounded_while_private_parts_of_it_are_used() -> None:
    uses = [path.name for path in SOURCES if PRIVATE_TORCH.search(path.read_text(encoding="utf-8"))]
    (torch,) = (found for found in map(Requirement, PROJECT["project"]["dependencies"]) if found.name == "torch")
    assert uses, "no private part is used any more: the bound can go, and this test"
    assert "<" in {part.operator for part in torch.specifier}, uses


def test_ci_runs_both_targets_and_nothing_else() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    made = re.findall(r"^make (\w+)", script.read_text(encoding="utf-8"), flags=re.M)
    assert made == ["test", "demo"]


# ---- the sources


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src/halve")))
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


FUNCTION_LINES, FUNCTION_PARAMETERS = 60, 8
COMMANDS = {
    (command.callback.__module__, command.callback.__name__) for command in app.registered_commands if command.callback
}
"""The parameters of a verb are its options, which typer reads from its signature. They are not counted."""


def functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (part for part in ast.walk(node) if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [name for place, name in enumerate(one.arg for one in named) if place or name not in ("self", "cls")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src/halve")))
def test_a_function_is_short_enough_to_read(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    too_long = set()
    for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
        assert function.end_lineno is not None
        many = len(parameters(function)) > FUNCTION_PARAMETERS and (module, function.name) not in COMMANDS
        if many or function.end_lineno - function.lineno >= FUNCTION_LINES:
            too_long.add(function.name)
    assert too_long == set()


def test_what_counts_as_a_parameter() -> None:
    (method,) = functions(ast.parse("class A:\n    def f(self, a, /, b, *c, d=1, **e): ..."))
    (function,) = functions(ast.parse("async def f(a, self): ..."))
    assert parameters(method) == ["a", "b", "d", "c", "e"]
    assert parameters(function) == ["a", "self"]
    assert ("halve.cli.study", "study") in COMMANDS


SHARED_NAMES = {
    "run": "what a stage, a pipeline, a study and the demo do",
    "check": "the verb and what it calls",
    "export": "the verb and what it calls",
    "main": "the two ways into the command",
    "INDEX": "the file of that kind in a model folder and in a cache",
    "MOST": "a bound, each time of what its module counts",
    "Answer": "of a teacher that runs, and as it is kept",
}


def top_level_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def test_a_public_name_stands_in_one_module() -> None:
    homes: dict[str, list[str]] = {}
    for path in SOURCES:
        for name in set(top_level_names(ast.parse(path.read_text(encoding="utf-8")))):
            if not name.startswith("_"):
                homes.setdefault(name, []).append(str(path.relative_to(ROOT / "src/halve")))
    shared = {name: paths for name, paths in homes.items() if len(paths) > 1}
    assert shared.keys() == SHARED_NAMES.keys(), shared
    assert len(shared) <= 10


def mentioned(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute | ast.alias):
            yield node.attr if isinstance(node, ast.Attribute) else node.name


def test_what_only_scripts_or_tests_use_lives_with_them() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    used = {name for tree in trees.values() for name in mentioned(tree)}
    unused = {name: path.name for path, tree in trees.items() for name in top_level_names(tree) if name not in used}
    assert {name for name in unused if not name.startswith("__")} <= set(PUBLIC), unused


def test_every_file_is_in_a_room() -> None:
    loose = {path.name for path in (ROOT / "src/halve").glob("*.py")}
    assert loose == {"__init__.py", "__main__.py", "errors.py", "progress.py"}
    for room in {path.parent for path in SOURCES}:
        door = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
        assert door, f"{room} does not say what it answers"


def test_what_is_called_slow_is_there() -> None:
    for line in (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines():
        path, *_, function = line.split()[-1].split("::")
        assert (ROOT / path).exists(), line
        source = (ROOT / path).read_text(encoding="utf-8")
        assert path.startswith("src") or f"def {function}(" in source, line


def test_one_file_names_families() -> None:
    # words that are also used for something else
    families = set(CONFIG_MAPPING_NAMES) - {"align", "git", "vision-encoder-decoder"}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in families}
        assert not named or path.name == "quirks.py", f"{path.name} names {named}"


# ---- the pages


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def shown_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for language, text in blocks(page):
            for line in text.splitlines() if language == "sh" else ():
                if line.startswith("halve "):
                    found.append((page.name, line.partition("#")[0].strip()))
    return found


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_a_shown_command_exists_with_its_flags(page: str, line: str) -> None:
    verb, *words = line.split()[1:]
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    known = {flag for p in command.params for flag in [*p.opts, *p.secondary_opts]}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readmes_python_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = (text for language, text in blocks(ROOT / "README.md") if language == "python")
    (tmp_path / "config.json").write_text(
        """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 128256, "tie_word_embeddings": false, "rope_theta": 500000.0}""",
        encoding="utf-8",
    )
    asked: list[Any] = []
    monkeypatch.setattr(halve, "run", lambda recipe, out: asked.append((recipe.name, out)))
    monkeypatch.chdir(ROOT)
    said = io.StringIO()
    with redirect_stdout(said):
        exec(text.replace("meta-llama/Llama-3.1-8B", str(tmp_path)), {})
    assert said.getvalue().splitlines() == [line[2:] for line in text.splitlines() if line.startswith("# ")]
    assert asked == [("llama-3.1-minitron-4b-width", "runs/minitron")]
    assert len([line for line in text.splitlines() if line]) <= 12


def test_recipes_in_the_pages_parse(tmp_path: Path) -> None:
    shown = [text for page in PAGES for language, text in blocks(page) if language == "yaml" and "\nmodel:" in text]
    assert shown
    for text in shown:
        halve.Recipe.model_validate(yaml.safe_load(text))


def test_every_key_of_a_recipe_has_words() -> None:
    page = (ROOT / "docs/reference/recipe.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page, flags=re.M)
    assert len(rows) > 100
    assert [key for key, words in rows if not words.strip()] == []


def test_no_summary_of_a_verb_is_cut_off() -> None:
    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    listed = page.partition("\nCommands:\n")[2].partition("```")[0].splitlines()
    assert len(listed) > 10
    assert [line for line in listed if not re.fullmatch(r"  \w+ +\S.*[^.]\.", line)] == []
