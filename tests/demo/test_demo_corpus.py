"""The demo's text, its task and the bars for its teacher: what is split, what is held out, and the arithmetic."""

from __future__ import annotations

import ast
import json
import lzma
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scripted import script

from halve.demo import corpus, task
from halve.demo.corpus import HELD_OUT, Module, take_apart
from halve.errors import CorpusError
from halve.model.choices import load_items

ngram = script("ngram")


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return list(corpus.read_modules(corpus.standard_library()))


# Code without docstrings


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ('"""Doc."""\nx = 1\n', "x = 1\n"),
        ('# head\n"""Doc."""\n\nx = 1\n', "# head\n\nx = 1\n"),
        ('def f():\n    """Doc.\n\n    More.\n    """\n\n    return 1\n', "def f():\n    return 1\n"),
        ('def f():\n    "Doc."  # why\n', "def f():\n    pass  # why\n"),
        ('def f(): "Doc."\n', "def f(): pass\n"),
        ('def f():\n    "Doc."; return 1\n', "def f():\n    pass; return 1\n"),
        ('class A:\n    "Doc."\n\n    x = 1\n    "About x."\n    y = 2\n', "class A:\n    x = 1\n    y = 2\n"),
        ('class A:\n    "Doc."\n    "Again."\n', "class A:\n    pass\n    pass\n"),
        ('class Ä:\n    ü = "ß"; "Doc."; é = 1\n', 'class Ä:\n    ü = "ß"; pass; é = 1\n'),
        ('def f():\n    ("Doc."\n     "two")\n    return 1\n', "def f():\n    return 1\n"),
        ('if x:\n    "one"\nelse:\n    "two"\n', "if x:\n    pass\nelse:\n    pass\n"),
        ('x = """kept"""\n', 'x = """kept"""\n'),
        ("def f():\n    # only code\n    return 'kept'\n", "def f():\n    # only code\n    return 'kept'\n"),
    ],
)
def test_docstrings_are_taken_out_of_code(source: str, code: str) -> None:
    assert take_apart("m", source).code == code


def test_prose_is_cleaned_and_in_reading_order() -> None:
    source = '''"""The module, described at its proper length."""
class A:
    """The class, described
        at proper length, with an indent.
    """
    def f(self):
        """Short."""
    async def g(self):
        """The coroutine, described at proper length."""
'''
    assert take_apart("m", source).prose == (
        "The module, described at its proper length.",
        "The class, described\nat proper length, with an indent.",
        "The coroutine, described at proper length.",
    )


def test_code_of_the_whole_library_parses_and_has_no_docstring(modules: list[Module]) -> None:
    for module in modules:
        for node in ast.walk(ast.parse(module.code)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                assert ast.get_docstring(node) is None, module.name


def test_taking_docstrings_out_changes_nothing_else(modules: list[Module]) -> None:
    root = corpus.standard_library()
    for name in ("argparse", "heapq", "turtle"):
        tree = ast.parse((root / f"{name}.py").read_text(encoding="utf-8"))
        (module,) = (module for module in modules if module.name == name)
        assert ast.dump(_Bare().visit(ast.parse(module.code))) == ast.dump(_Bare().visit(tree))


class _Bare(ast.NodeTransformer):
    """Without statements that are strings, and without `pass`."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        constant = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if constant else node

    def visit_Pass(self, node: ast.Pass) -> None:
        return None


# The split


def test_held_out_modules_are_in_neither_training_text(modules: list[Module]) -> None:
    held_out = {module.name for module in modules if module.held_out}
    assert {name.partition(".")[0] for name in held_out} == set(HELD_OUT)
    train = list(corpus.documents(modules, held_out=False))
    assert not held_out & {row["module"] for row in train}
    text = "\n\n".join(row["text"] for row in train)
    for module in modules:
        if module.held_out:
            assert not [doc for doc in module.prose if f"\n\n{doc}\n\n" in text]


def test_held_out_share_is_small_but_enough(modules: list[Module]) -> None:
    code, prose = Counter[bool](), Counter[bool]()
    for module in modules:
        code[module.held_out] += len(module.code)
    for held_out in (False, True):
        prose[held_out] = sum(len(row["text"]) for row in corpus.documents(modules, held_out=held_out))
    for sizes in (code, prose):
        assert 0.02 < sizes[True] / sizes.total() < 0.1
        assert sizes[True] > 80_000


def test_tests_of_held_out_modules_are_held_out_too() -> None:
    assert Module("test.test_csv", "", ()).held_out
    assert Module("test.csv_helper.test_heapq.more", "", ()).held_out
    assert not Module("test.test_csvs", "", ()).held_out
    assert not Module("email.message", "", ()).held_out


def test_prose_files_are_deterministic_json_lines(tmp_path: Path, modules: list[Module]) -> None:
    first = corpus.write_prose(tmp_path / "a", modules)
    second = corpus.write_prose(tmp_path / "b", iter(modules))
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    train, valid = ([json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in first)
    assert min(len(row["text"]) for row in train) >= 40
    order = [module.name for module in modules]
    assert [row["module"] for row in train] == sorted((row["module"] for row in train), key=order.index)
    assert {row["module"].partition(".")[0] for row in valid} == set(HELD_OUT)


def test_no_test_packages_and_no_machine_files(modules: list[Module]) -> None:
    parts = {part for module in modules for part in module.name.split(".")}
    assert not parts & {"test", "tests", "idlelib", "site-packages", "encodings"}
    assert not [part for part in parts if part.startswith("_sysconfigdata")]


def test_files_that_do_not_parse_are_passed_over(tmp_path: Path) -> None:
    files = {"good.py": b"x = 1\n", "bad.py": b"print 1\n", "latin.py": b"x = '\xe4'\n", "nul.py": b"x = '\0'\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert [module.name for module in corpus.read_modules(tmp_path)] == ["good"]


def test_a_library_without_sources_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python3.zip")})
    with pytest.raises(CorpusError, match=r"no sources of its standard library\n.*\n  fix: --corpus FILE"):
        corpus.standard_library()


def test_a_library_stripped_of_docstrings_is_said(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no sources of its standard library"):
        corpus.write_prose(tmp_path, [Module(f"m{i}", "x = 1", ()) for i in range(500)])
    assert list(tmp_path.iterdir()) == []


# Which line comes next


@pytest.fixture(scope="module")
def items(modules: list[Module]) -> list[task.TaskItem]:
    return task.build_items(module for module in modules if module.held_out)


def test_items_ask_for_the_line_that_comes_next(items: list[task.TaskItem], modules: list[Module]) -> None:
    code = "\n\0\n".join(module.code for module in modules if module.held_out)
    lines = set(code.split("\n"))
    assert len(items) == 400
    for item in items:
        answer = item["choices"][item["answer"]]
        assert item["context"] + answer + "\n" in code
        assert len(set(item["choices"])) == 4
        assert lines.issuperset(item["choices"])
        assert len({len(line) - len(line.lstrip()) for line in item["choices"]}) == 1
        others = [line for line in item["choices"] if line != answer]
        assert not [line for line in others if item["context"] + line + "\n" in code]
        assert item["context"].endswith("\n")
        assert len(item["context"]) + max(map(len, item["choices"])) < 480


def test_items_are_deterministic_and_their_answers_balanced(
    tmp_path: Path, items: list[task.TaskItem], modules: list[Module]
) -> None:
    again = task.build_items([module for module in modules if module.held_out], seed=0)
    assert again == items
    assert task.build_items([module for module in modules if module.held_out], seed=1) != items
    places = Counter(item["answer"] for item in items)
    assert all(70 < places[place] < 130 for place in range(4))
    read = load_items(task.write_items(tmp_path / "items.jsonl", items))
    assert [(item.context, list(item.choices), item.answer) for item in read] == [
        (item["context"], item["choices"], item["answer"]) for item in items
    ]


# Baselines


def test_kneser_ney_sums_to_one_and_matches_the_formula() -> None:
    draw = random.Random(0)
    stream = [draw.choice((0, 0, 1, 2, draw.randrange(6))) for _ in range(300)]
    model = ngram.fit(stream, vocab=7, order=3)
    for history in [(0, 0), (1, 2), (5, 4), (6, 6)]:
        p = [2 ** -model.bits([*history, token])[0] for token in range(7)]
        assert sum(p) == pytest.approx(1, abs=1e-12)
        assert p == pytest.approx([_kneser_ney(stream, history, token, vocab=7) for token in range(7)])


def _kneser_ney(stream: list[int], history: tuple[int, ...], token: int, *, vocab: int) -> float:
    """The formula spelled out with dictionaries."""
    order = len(history) + 1
    grams = Counter(zip(*(stream[i:] for i in range(order)), strict=False))
    tables = {order: grams}
    for n in range(order - 1, 0, -1):
        tables[n] = Counter(gram[1:] for gram in tables[n + 1])
    p = 1 / vocab
    for n in range(1, order + 1):
        table, context = tables[n], history[order - n :]
        ones, twos = (sum(count == times for count in table.values()) for times in (1, 2))
        discount = ones / (ones + 2 * twos) if ones else 0.5
        following = {gram[-1]: count for gram, count in table.items() if gram[:-1] == context}
        if total := sum(following.values()):
            share = max(following.get(token, 0) - discount, 0) / total
            p = share + discount * len(following) / total * p
    return p


def test_a_longer_context_helps_where_there_is_one_to_learn() -> None:
    draw = random.Random(1)
    table = {(a, b): draw.randrange(9) for a in range(9) for b in range(9)}
    stream = [0, 1]
    for _ in range(6000):
        stream.append(table[stream[-2], stream[-1]] if draw.random() < 0.9 else draw.randrange(9))
    bits = [ngram.fit(stream[:5000], vocab=9, order=n).bits(stream[5000:]).mean() for n in (1, 3)]
    assert bits[1] < 1.2 < 2 < bits[0]


def test_xz_knows_what_it_has_read_before() -> None:
    text = np.random.default_rng(0).bytes(20_000)
    alone = ngram.xz_bits(text)
    assert alone == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert ngram.xz_bits(text, after=text) < alone / 50
