"""The report on a made-up run folder: whole, partly finished, hostile."""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from halve.disk.files import file_sha256, sealed, write_json
from halve.errors import RunError
from halve.report import page as report
from halve.report import plots, sections, written
from halve.report.plots import Series

BEFORE = {"layers": 10, "hidden": 128, "ffn": 352, "heads": 8, "kv_heads": 4, "head_dim": 16, "vocab": 2048}
AFTER = BEFORE | {"layers": 8, "hidden": 112, "ffn": 240}
KEPT_LAYERS = [0, 1, 2, 3, 5, 6, 8, 9]
# params, non-embedding, nll, kl, agreement, accuracy
MODELS = {
    "teacher": (1_871_232, 1_609_088, 1.92, 0.214, 0.78, 0.812),
    "corrected": (1_871_232, 1_609_088, 1.71, None, None, 0.806),
    "pruned": (1_033_200, 803_824, 4.43, 2.61, 0.24, 0.331),
    "distilled": (1_033_200, 803_824, 1.93, 0.197, 0.752, 0.742),
    "ce": (1_033_200, 803_824, 1.99, 0.302, 0.711, 0.708),
    "random_init": (1_033_200, 803_824, 2.74, 1.08, 0.493, 0.402),
}


def estimate(value: float | None, stderr: float) -> dict[str, float] | None:
    return None if value is None else {"value": value, "stderr": stderr}


def results() -> dict[str, Any]:
    models = {}
    for name, (params, bare, nll, kl, agreement, accuracy) in MODELS.items():
        small = params < 1_500_000
        one = {
            "params": params,
            "non_embedding_params": bare,
            "weight_bytes": 4 * params,
            "dtype": "float32",
            "nll": estimate(nll, 0.031),
            "perplexity": estimate(math.exp(nll), 0.031 * math.exp(nll)),
            "bits_per_byte": estimate(nll / 3.1 / math.log(2), 0.0142),
            "choices": {
                "next_line": estimate(accuracy, 0.021)
                | {"items": 360, "acc": estimate(accuracy - 0.0625, 0.021), "acc_norm": None}
            },
            "speed": {
                "prefill_tokens_per_second": 21_400.0 if small else 12_100.0,
                "decode_tokens_per_second": 412.3 if small else 287.9,
                "peak_memory_bytes": 6_412_000 if small else 10_911_000,
            },
        }
        if kl is not None:
            one |= {"kl": estimate(kl, 0.02 * kl + 0.002), "agreement": estimate(agreement, 0.006)}
        models[name] = one
    ours = models["distilled"]
    against = {
        name: {
            "nll": estimate(ours["nll"]["value"] - one["nll"]["value"], 0.008),
            "choices": {
                "next_line": estimate(
                    ours["choices"]["next_line"]["value"] - one["choices"]["next_line"]["value"], 0.019
                )
            },
        }
        | (
            {"kl": estimate(ours["kl"]["value"] - one["kl"]["value"], 0.006), "agreement": estimate(0.04, 0.004)}
            if "kl" in one
            else {}
        )
        for name, one in models.items()
        if name != "distilled"
    }
    prompts = {
        "Return the number of": " items in the list, or None if the sequence is empty.\n\n    If *key* is given, it "
        "must be a callable that",
        "Raise ValueError if <b>": " the argument is not a valid integer & the stream has been closed.",
    }
    return {
        "reference": "corrected",
        "samples": {"count": 64, "context": 256, "tokens": 16320, "bytes": 50_592, "fingerprint": "ab" * 32},
        "machine": {"device": "CPU, 2 cores", "threads": 2},
        "speed_test": {"batch": 1, "prompt_tokens": 224, "new_tokens": 32, "repeats": 5},
        "models": models,
        "differences": {"subject": "distilled", "against": against},
        "completions": [
            {
                "prompt": prompt,
                "texts": {name: text if name != "pruned" else " the the of self, the the the of" for name in MODELS},
            }
            for prompt, text in prompts.items()
        ],
    }


def metrics(start: float, end: float, *, noise: int, ce: float) -> list[str]:
    random = np.random.default_rng(noise)
    lines = [{"step": 0, "tokens": 0, "heldout": {"kl": start, "ce": start + ce, "agreement": 0.2}}]
    for step in range(1, 301):
        level = end + (start - end) * math.exp(-step / 22) + 0.3 * (end + 0.2) * math.exp(-step / 120)
        line: dict[str, Any] = {
            "step": step,
            "tokens": step * 8192,
            "loss": level * math.exp(0.06 * random.standard_normal()),
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens_per_second": 20_000.0,
        }
        if step % 25 == 0:
            line["heldout"] = {"kl": level, "ce": level + ce, "agreement": 0.7}
        lines.append(line)
    return [json.dumps(line) for line in lines]


def scores() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    shape = {axis: BEFORE[axis] for axis in ("hidden", "ffn", "heads")}
    heads = random.lognormal(0, 0.6, (BEFORE["layers"], shape["heads"])).astype(np.float32)
    return {
        "layers": np.array([0.61, 0.22, 0.15, 0.13, 0.07, 0.11, 0.10, 0.06, 0.12, 0.34], dtype=np.float32),
        "hidden": random.lognormal(0, 0.7, shape["hidden"]).astype(np.float32) * 40,
        "ffn": random.lognormal(0, 0.9, (BEFORE["layers"], shape["ffn"])).astype(np.float32),
        "heads": heads,
        "kv_heads": heads.reshape(BEFORE["layers"], -1, 2).sum(-1),
    }


def make_run(folder: Path) -> Path:
    """A finished run, as the pipeline leaves it, models left out."""
    folder.mkdir(parents=True)
    recipe = {
        "name": "demo",
        "model": "/home/someone/secret/teacher",
        "seed": 0,
        "data": {"train": ["/home/someone/secret/train.jsonl"], "valid": ["hub:owner/name:valid"], "context": 256},
        "correct": None,
        "prune": {"non_embedding_ratio": 0.5, "params": None, "gain": "fitted"},
        "distill": {"tokens": 2_457_600, "lr": 1e-3, "baselines": ["ce", "random_init"]},
        "evaluate": {"prompts": ["/etc is kept"], "choices": ["/home/someone/secret/next_line.jsonl"]},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"format": 1, "recipe": "demo", "model": recipe["model"]}))
    files: dict[str, dict[str, Any]] = {
        "correct": {"metrics.jsonl": metrics(0.25, 0.0, noise=4, ce=1.7)},
        "score": {},
        "prune": {
            "plan.json": {
                "family": "llama",
                "before": BEFORE,
                "after": AFTER,
                "layers": KEPT_LAYERS,
                "hidden": list(range(112)),
                "ffn": [list(range(240))] * 8,
                "heads": [list(range(8))] * 7 + [[0, 1, 2, 4, 5, 6, 7]],
                "kv_heads": [[0, 1, 2, 3]] * 8,
                "gain": "fitted",
                "made": {
                    "cut": "plain",
                    "compared": {"refit_kl": 1.3149, "plain_kl": 1.2, "compared_tokens": 4096},
                    "rotation": "none",
                    "unrotated": "the plain cut keeps it",
                },
            }
        },
        "distill": {"metrics.jsonl": metrics(2.6, 0.19, noise=1, ce=1.72)},
        "distill-ce": {"metrics.jsonl": metrics(2.6, 0.29, noise=2, ce=1.69)},
        "distill-random_init": {"metrics.jsonl": metrics(5.9, 1.02, noise=3, ce=1.70)},
        "evaluate": {"results.json": results()},
    }
    for stage, contents in files.items():
        (folder / stage).mkdir()
        for name, content in contents.items():
            text = "\n".join(content) if isinstance(content, list) else json.dumps(content)
            (folder / stage / name).write_text(text, encoding="utf-8")
        manifest = {
            "stage": stage,
            "key": hashlib.sha256(stage.encode()).hexdigest(),
            "seed": 0,
            "inputs": {},
            "versions": {"python": "3.11.7", "halve": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "metrics": {},
        }
        write_json(folder / stage / "manifest.json", sealed(manifest))
    about = {"model": "ef" * 32, "samples": "01" * 32, "batch_agg": "l2", "seq_agg": "mean"}
    save_file(scores(), folder / "score/scores.safetensors", metadata={"format": "x", "about": json.dumps(about)})
    for stage in files:
        seal(folder / stage)
    (folder / ".distill.work").mkdir()
    return folder


def seal(stage: Path) -> None:
    """Write down what the files of a stage hold; its model is left out and stands there all the same."""
    manifest = json.loads((stage / "manifest.json").read_text())
    listed = (path for path in stage.rglob("*") if path.is_file() and path.name != "manifest.json")
    here = {path.relative_to(stage).as_posix(): path for path in listed}
    found = {name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for name, path in here.items()}
    found["model/model.safetensors"] = {"size": 4_132_800, "sha256": "cd" * 32}
    manifest.pop("digest")
    write_json(stage / "manifest.json", sealed({**manifest, "files": found}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


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


def test_the_card(run: Path, tmp_path: Path) -> None:
    report.write_report(run, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["halve", "pruning", "distillation"],
    }
    assert "| **Distilled student** | " in body
    embedded = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(embedded)["distill"]["baselines"] == ["ce", "random_init"]
    assert "someone" not in card
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {8, 5}


def test_the_card_names_the_students_license(run: Path, tmp_path: Path) -> None:
    part = shutil.copytree(run, tmp_path / "run")
    (part / "distill" / "model").mkdir()
    (part / "distill" / "model" / "README.md").write_text("---\nlicense: other\nlicense_name: 'llama3: 1'\n---\n")
    seal(part / "distill")
    report.write_report(part, tmp_path / "out")
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "llama3: 1")
    assert front["tags"] == ["halve", "pruning", "distillation"]


def test_a_hub_teacher_is_named_as_base_model(run: Path, tmp_path: Path) -> None:
    part = shutil.copytree(run, tmp_path / "run")
    recipe = json.loads((part / "recipe.json").read_text())
    (part / "recipe.json").write_text(json.dumps(recipe | {"model": "owner/name-8B"}))
    report.write_report(part, tmp_path / "out")
    assert "\nbase_model: owner/name-8B\n" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


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


# ---- numbers and plots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "options", "want"),
    [
        ({"value": 12.3456, "stderr": 0.123}, {}, ("12.35", "0.12")),
        ({"value": 0.7421, "stderr": 0.0212}, {"percent": True}, ("74.2", "2.1")),
        ({"value": 5.0, "stderr": None}, {}, ("5.000", "")),
        ({"value": 512.3, "stderr": 37.0}, {}, ("512", "37")),
        ({"value": 0.5, "stderr": 0.1}, {"signed": True}, ("+0.50", "0.10")),
        ({"value": None, "stderr": None}, {}, ("-", "")),
        (None, {}, ("-", "")),
    ],
)
def test_estimates_read_to_the_second_digit_of_their_error(one: Any, options: Any, want: tuple[str, str]) -> None:
    cell = sections.estimate(one, **options)
    assert (cell.value, cell.error) == want


def test_only_clear_differences_are_colored() -> None:
    assert sections.estimate({"value": -0.3, "stderr": 0.1}, signed=True).clear
    assert not sections.estimate({"value": -0.15, "stderr": 0.1}, signed=True).clear


@pytest.mark.parametrize(("num_bytes", "want"), [(512, "512 B"), (4_132_800, "4.13 MB"), (16e9, "16 GB")])
def test_sizes_in_bytes(num_bytes: float, want: str) -> None:
    assert sections.short_bytes(num_bytes) == want


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.94), (2.1, 2.2), (0, 2_457_600), (-3, 5)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = plots.ticks(low, high)
    assert 3 <= len(found) <= 8
    assert low <= found[0] < found[-1] <= high
    assert len({round(b - a, 9) for a, b in itertools.pairwise(found)}) == 1


def coordinates(svg: str, tag: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf'<{tag} [^>]*\b{name}="([-0-9.]+)"', svg)]


@pytest.mark.parametrize("log_y", [False, True])
def test_curves_stay_inside_and_labels_apart(log_y: bool) -> None:
    series = [Series(str(i), "ce", ((0.0, 5.0), (1e6, 1.0 + i / 1000))) for i in range(6)]
    svg = plots.curves(series, title="t", x_label="tokens", log_y=log_y)
    width, height = (float(x) for x in re.findall(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', svg)[0])
    assert all(0 <= x <= width for x in coordinates(svg, "circle", "cx"))
    assert all(0 <= y <= height for y in coordinates(svg, "circle", "cy"))
    labels = sorted(float(y) for y in re.findall(r'<text class="label ce" x="[^"]*" y="([^"]*)"', svg))
    assert len(labels) == 6
    assert min(b - a for a, b in itertools.pairwise(labels)) >= 13.9


def test_cut_entries_are_outlines() -> None:
    svg = plots.bars([3.0, 1.0, 2.0], [True, False, True], title="t", x_label="layer")
    assert re.findall(r'class="bar (\w+)"', svg) == ["kept", "cut", "kept"]
    heights = coordinates(svg, "rect", "height")
    assert heights[0] > heights[2] > heights[1] > 0
    svg = plots.grid([[1.0, 0.5]], [[True, False]], ["0"], title="t", x_label="head", group=1)
    assert re.findall(r'class="(cell[^"]*)"', svg) == ["cell", "cell cut"]


def test_plots_survive_what_models_do() -> None:
    assert "nan" not in plots.dots([plots.Interval("one", "ce", 1.0, None)], title="t")
    assert "nan" not in plots.bars([0.0, 0.0], [True, True], title="t", x_label="x")
    assert "nan" not in plots.profile([1.0] * 5, 5, title="t", x_label="x")
    flat = [Series("a", "ce", ((0.0, 1.0), (10.0, 1.0)))]
    assert "nan" not in plots.curves(flat, title="t", x_label="x")
    assert "&lt;" in plots.curves([Series("<", "ce", ((0.0, 1.0), (1.0, 2.0)))], title="<", x_label="x")
