"""The report on a made-up run folder: whole, partly finished, hostile."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
from made_run import estimate, results, seal
from pydantic import AfterValidator

from halve.disk.files import sealed, write_json
from halve.errors import RunError
from halve.recipe.schema import Recipe
from halve.recipe.values import Section, path_or_name
from halve.report import page as report
from halve.report import sections, written


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page")
    report.write_report(run, out)
    return (out / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Tags that are balanced, the headings, and every attribute that could load something."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_is_well_formed_and_stands_alone(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    assert outline.headings == [
        "Quality", "What was cut", "Speed", "Learning", "Importance", "What they write", "Recipe and provenance",
    ]  # fmt: skip
    assert outline.links == []
    assert not outline.tags & {"script", "link", "img", "iframe"}
    assert "@import" not in page
    assert "url(" not in page
    assert page.count("<svg") == 4 + 4 + 4


def test_the_figures_are_those_of_the_results(page: str) -> None:
    text = re.sub(r"<[^>]+>", " ", page)
    assert "From 1.87M parameters to 1.03M" in text
    assert "0.898 ± 0.014 bits per byte" in re.sub(r"\s+", " ", text)
    assert "0.1970 ± 0.0059" in re.sub(r"\s+", " ", text)
    assert "74.2 ± 2.1" in re.sub(r"\s+", " ", text)
    assert "Dropped layers 4, 7, counted from 0." in text


def test_page_and_card_say_which_student_was_kept(run: Path, tmp_path: Path) -> None:
    report.write_report(run, tmp_path)
    for name in ("report.html", "README.md"):
        text = " ".join(html.unescape((tmp_path / name).read_text()).split())
        assert "The plain cut was kept: its KL to the teacher is 1.2 nats per token on 4,096 calibration tokens" in text
        assert "that of the refit student of the same sizes 1.31." in text
        assert "hidden was cut in the model's own basis: the plain cut keeps it." in text


def test_models_and_text_cannot_write_html(page: str) -> None:
    assert "Raise ValueError if &lt;b&gt;" in page
    assert "<b>" not in page.split("What they write")[1].split("</section>")[0]


def test_nobodys_folders_are_shown(page: str) -> None:
    assert "someone" not in page
    assert "train.jsonl" in page
    assert "/etc is kept" in page


def test_no_key_of_a_recipe_shows_folders(run: Path, tmp_path: Path) -> None:
    place = "/home/someone/secret"
    recipe = {
        "name": "demo",
        "model": f"{place}/teacher",
        "data": {"train": {"code": {"sources": [f"{place}/code.jsonl"], "weight": 0.5}}, "valid": [f"{place}/v.jsonl"]},
        "score": {"depth_task": f"{place}/depth.jsonl"},
        "search": {"tournament": {"choices": f"{place}/search.jsonl"}},
        "evaluate": {
            "prompts": ["/etc is kept"],
            "choices": [f"{place}/choices.jsonl"],
            "data": {"ifeval": f"{place}/ifeval.jsonl"},
            "imported": [{"file": f"{place}/imported.json", "model": "teacher"}],
        },
        "align": [{"data": [f"{place}/pairs.jsonl"], "reward_model": f"{place}/judge"}],
        "then": [],
    }
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    report.write_page(tmp_path / "run", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "someone" not in page
    names = ("code", "v", "depth", "search", "choices", "ifeval", "pairs")
    for shown in (*(f"{name}.jsonl" for name in names), "imported.json", "judge", "weight: 0.5", "/etc is kept"):
        assert shown in page, shown


def keys_of_paths(section: Any) -> set[str]:
    """The keys of a section of the recipe, and of those below it, whose values are paths."""
    found: set[str] = set()

    def look(key: str, hint: Any) -> None:
        if isinstance(hint, AfterValidator) and hint.func is path_or_name:
            found.add(key)
        elif isinstance(hint, type) and issubclass(hint, Section):
            found.update(keys_of_paths(hint))
        for part in (*get_args(hint), *getattr(hint, "metadata", ())):
            look(key, part)

    for key, field in section.model_fields.items():
        for hint in (field.annotation, *field.metadata):
            look(key, hint)
    return found


def test_the_page_knows_every_key_that_holds_a_path() -> None:
    keys = keys_of_paths(Recipe)
    assert {"model", "sources", "choices", "reward_model"} <= keys
    assert keys <= report.PATHS


def test_the_headline_compares_quality_with_the_models_own_teacher() -> None:
    found = {tile["label"]: tile["before"] for tile in sections.tiles(results())}
    assert found["Bits per byte"] == "its teacher: 0.796"
    assert found["Next line"] == "its teacher: 80.6 %"
    assert found["Parameters"] == "from 1.87M"


def test_blank_lines_are_folded_and_indents_kept() -> None:
    raw = results()
    raw["completions"] = [{"prompt": "p", "texts": {"teacher": " a\n\n \n\t\n\n    b\n\nc\n\n\n"}}]
    section = written.completions(raw)
    assert section is not None
    assert section.completions[0].texts[0]["text"] == " a\n\n    b\n\nc"


def test_the_same_folder_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    report.write_report(run, tmp_path / "a")
    report.write_report(shutil.copytree(run, tmp_path / "copy"), tmp_path / "b")
    for name in ("report.html", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_only_the_two_files_are_written(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    report.write_report(run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "report.html"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (["evaluate"], {"Quality", "Speed", "What they write"}),
        (["score"], {"Importance"}),
        (["prune"], {"What was cut"}),
        (["distill", "distill-ce", "distill-random_init", "correct"], {"Learning"}),
        (
            ["correct", "score", "prune", "distill", "distill-ce", "distill-random_init", "evaluate"],
            {"Quality", "What was cut", "Speed", "Learning", "Importance", "What they write"},
        ),
    ],
)
def test_unfinished_stages_are_left_out(run: Path, tmp_path: Path, missing: list[str], gone: set[str]) -> None:
    part = shutil.copytree(run, tmp_path / "run")
    for stage in missing:
        (part / stage / "manifest.json").unlink()  # a stage without its manifest has not finished
    report.write_report(part, tmp_path / "out")
    headings = set(Outline((tmp_path / "out/report.html").read_text(encoding="utf-8")).headings)
    assert headings == {
        "Quality", "What was cut", "Speed", "Learning", "Importance", "What they write", "Recipe and provenance",
    } - gone  # fmt: skip


def test_stages_stand_in_the_order_of_the_pipeline(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for stage in ("cache", "prune-2", "cache-2", "distill-2-ce"):
        (tmp_path / "run" / stage).mkdir()
        shutil.copy(tmp_path / "run/score/manifest.json", tmp_path / "run" / stage)
        seal(tmp_path / "run" / stage)
    first = ["correct", "score", "prune", "cache", "distill", "distill-ce", "distill-random_init"]
    second = ["prune-2", "cache-2", "distill-2-ce"]
    assert list(report.read_run(tmp_path / "run").manifests) == [*first, *second, "evaluate"]


def test_the_accuracies_of_the_harness_stand_beside_ours() -> None:
    found = sections.quality(results())
    assert found is not None
    assert found.table.head[-2:] == ("Next line, %", "Next line acc, %")  # no acc_norm where there is none
    ours, acc = found.table.rows[0].cells[-2:]
    assert (ours.value, acc.value) == ("81.2", "75.0")
    assert "lm-evaluation-harness" in found.note


def test_what_a_step_changed_stands_below_its_values(run: Path, tmp_path: Path) -> None:
    part = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(part / "distill-ce", part / "align-sft")
    for path in (part / "align-sft").glob("*"):
        path.unlink()
    write_json(part / "align-sft/manifest.json", sealed({"stage": "align-sft", "key": "a", "seed": 0, "metrics": {}}))
    seal(part / "align-sft")
    raw = results()
    raw["models"]["aligned-sft"] = raw["models"]["distilled"] | {"kl": estimate(0.25, 0.01)}
    step = {"before": "distilled", "kl": estimate(0.053, 0.004), "choices": {"next_line": estimate(-0.01, 0.019)}}
    raw |= {"steps": {"aligned-sft": step}}
    (part / "evaluate/results.json").write_text(json.dumps(raw))
    seal(part / "evaluate")
    report.write_report(part, tmp_path / "out")
    page, card = ((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    assert Outline(page).open == []
    (shown,) = (section for section in page.split("<section>") if "<h2>Alignment</h2>" in section)
    assert '<td>0.250 <small>± 0.010</small><div class="under clear">+0.0530 ± 0.0040</div></td>' in shown
    assert '<small>± 2.1</small><div class="under">\N{MINUS SIGN}1.0 ± 1.9</div></td>' in shown
    (told,) = (section for section in card.split("## ") if section.startswith("Alignment"))
    assert "| 0.250 ± 0.010<br>+0.0530 ± 0.0040 |" in told
    assert "| Next line | 74.2 ± 2.1 | 74.2 ± 2.1<br>\N{MINUS SIGN}1.0 ± 1.9 |" in told


def test_a_run_that_only_prunes(run: Path, tmp_path: Path) -> None:
    part = shutil.copytree(run, tmp_path / "run")
    for stage in ("correct", "distill", "distill-ce", "distill-random_init"):
        shutil.rmtree(part / stage)
    raw = results()
    raw["models"] = {name: raw["models"][name] for name in ("teacher", "pruned")}
    raw |= {"reference": "teacher", "differences": None, "completions": []}
    for one in raw["models"].values():
        one["speed"] = None
        one["choices"] = {}
        one["bits_per_byte"]["stderr"] = None  # one sample has no error
    (part / "evaluate/results.json").write_text(json.dumps(raw))
    seal(part / "evaluate")
    report.write_report(part, tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "The pruned model needs" in text
    assert "Distilled student" not in text


def test_a_damaged_file_is_named(run: Path, tmp_path: Path) -> None:
    part = shutil.copytree(run, tmp_path / "run")
    (part / "prune/plan.json").write_text("{")
    with pytest.raises(RunError, match=r"plan\.json is not what halve wrote"):
        report.write_report(part, tmp_path / "out")
    with pytest.raises(RunError, match=r"cannot read .*recipe\.json"):
        report.write_report(tmp_path / "nothing", tmp_path / "out")


def test_it_does_not_import_torch() -> None:
    code = "import sys, halve.report.page; assert 'torch' not in sys.modules; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
