"""The demo's text: the standard library, which every Python installation has.

Each module is split into two texts that share no sentence:

    code    its source without docstrings    the demo's teacher learned from this
    prose   its docstrings, cleaned           the demo corrects and distills on this

The modules in the fixed list `HELD_OUT` are in neither training text. Results are measured on them.
"""

from __future__ import annotations

import ast
import inspect
import json
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from halve.errors import CorpusError

# On different topics, in every Python from 3.11 on, and without a near copy elsewhere in the library.
HELD_OUT = (
    "calendar",
    "configparser",
    "csv",
    "difflib",
    "fractions",
    "heapq",
    "queue",
    "selectors",
    "shlex",
    "smtplib",
    "statistics",
    "tarfile",
    "tempfile",
    "textwrap",
)

# Tables and generated files rather than code, or different from machine to machine.
_SKIPPED = frozenset(
    {
        "__phello__",
        "encodings",
        "idlelib",
        "lib-dynload",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "turtledemo",
    }
)
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_FEWEST_MODULES = 100
_SHORTEST_PROSE = 40  # characters; shorter docstrings only repeat the name above them


@dataclass(frozen=True)
class Module:
    """One split module: its dotted name, its code without docstrings, and its docstrings in order."""

    name: str
    code: str
    prose: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether the module, or the module that it tests, is named in `HELD_OUT`."""
        return any(part.removeprefix("test_") in HELD_OUT for part in self.name.split("."))


def standard_library() -> Path:
    """The folder of the running Python's library; `CorpusError` if its sources are not there."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if sum(1 for _ in root.glob("*.py")) < _FEWEST_MODULES // 2:
        raise _no_sources(root)
    return root


def read_modules(root: Path, *, tests: bool = False) -> Iterator[Module]:
    """Take apart every module under `root`, ordered by path.

    Files that this Python cannot parse are skipped: the library contains some on purpose. `tests` adds the library's
    own tests, which some systems package separately.
    """
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    for path in sorted(files, key=lambda file: file.parts):
        name = _dotted(path)
        parts = name.split(".")
        if not all(part.isidentifier() for part in parts) or _SKIPPED.intersection(path.parts):
            continue
        if parts[0].startswith("_sysconfigdata") or (not tests and _TEST_FOLDERS.intersection(parts)):
            continue
        try:
            with tokenize.open(root / path) as file:
                source = file.read()
            yield take_apart(name, source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue


def take_apart(name: str, source: str) -> Module:
    """Separate a module's source into code and docstrings.

    The code still parses: a docstring that was a body's only statement becomes `pass`. Comments stay.
    Strings that are statements by themselves are removed as well, because they read like docstrings. Only true
    docstrings become prose.

    >>> source = 'def half(x):\\n    "Divide a number by two, as floats are divided."\\n    return x / 2'
    >>> take_apart("m", source).code
    'def half(x):\\n    return x / 2'
    >>> take_apart("m", source).prose
    ('Divide a number by two, as floats are divided.',)

    Raises `SyntaxError` or `ValueError` for a source that does not parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old files
        tree = ast.parse(source)
    return Module(name=name, code=_without_strings(tree, source), prose=tuple(_docstrings(tree)))


def documents(modules: Iterable[Module], *, held_out: bool) -> Iterator[dict[str, str]]:
    """One prose document per module, `{"module", "text"}`: its docstrings with blank lines between them.

    A docstring that occurs twice is kept once. A docstring that a held-out module also has is never in the training
    text.
    """
    modules = list(modules)
    seen = set() if held_out else {text for module in modules if module.held_out for text in module.prose}
    for module in modules:
        if module.held_out is held_out:
            fresh = [text for text in dict.fromkeys(module.prose) if text not in seen]
            seen.update(fresh)
            if fresh:
                yield {"module": module.name, "text": "\n\n".join(fresh) + "\n"}


def write_prose(folder: Path, modules: Iterable[Module]) -> tuple[Path, Path]:
    """Write the distillation corpus as JSON lines; returns the training and the held-out file.

    The same library gives the same bytes. Raises `CorpusError` if there is too little prose, as in an
    installation that was stripped of its docstrings.
    """
    modules = list(modules)
    paths = folder / "prose.train.jsonl", folder / "prose.valid.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    for path, held_out in zip(paths, (False, True), strict=True):
        rows = list(documents(modules, held_out=held_out))
        if len(rows) < (len(HELD_OUT) if held_out else _FEWEST_MODULES):
            raise _no_sources(standard_library())
        lines = (json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows)
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
    return paths


def _no_sources(root: Path) -> CorpusError:
    return CorpusError(
        "this Python has no sources of its standard library",
        why=f"{root} holds too few documented modules; the library may be zipped, frozen or stripped",
        fix="--corpus FILE with a text of your own, or a Python with its sources",
    )


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings in the order in which a reader meets them."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    inner = [node for body in _bodies(tree) for node in body if isinstance(node, kinds)]
    owners: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree, *inner]
    owners.sort(key=lambda node: getattr(node, "lineno", 0))
    for node in owners:
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
        if len(text) >= _SHORTEST_PROSE:
            yield text


def _without_strings(tree: ast.Module, source: str) -> str:
    # The parser counts columns in UTF-8 bytes, and calls only these three line ends.
    lines = [line.encode() for line in source.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    cuts = [
        (statement, body is not tree.body and all(map(_is_string, body)))
        for body in _bodies(tree)
        for statement in body
        if _is_string(statement)
    ]
    for statement, alone in sorted(cuts, key=lambda cut: (-cut[0].lineno, -cut[0].col_offset)):
        _cut(lines, statement, leave_pass=alone)
    return b"\n".join(lines).decode().lstrip("\n")


def _cut(lines: list[bytes], statement: ast.stmt, *, leave_pass: bool) -> None:
    """Take one string statement out of a private list of lines."""
    assert statement.end_lineno is not None
    assert statement.end_col_offset is not None
    first, last = statement.lineno - 1, statement.end_lineno - 1
    before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
    if leave_pass or before.strip() or after.strip():
        lines[first : last + 1] = [before + b"pass" + after]
        return
    while last + 1 < len(lines) and not lines[last + 1].strip() and statement.col_offset > 0:
        last += 1  # blank lines that set the docstring off from the body
    del lines[first : last + 1]


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements. Expressions, which are most of a tree, are not visited."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        nodes = getattr(node, field, None)
        if isinstance(nodes, list):
            if nodes and isinstance(nodes[0], ast.stmt):
                yield nodes
            for inner in nodes:
                yield from _bodies(inner)
