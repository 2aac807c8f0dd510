"""The report: one HTML page and a model card, made from nothing but the run folder.

The page needs no network, no script and no second file. The same run folder gives the same bytes. Stages that have not
finished are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from safetensors import safe_open

from halve.disk import plain_json
from halve.disk.files import atomic_file, read_json, read_object
from halve.disk.gguf_header import is_gguf
from halve.disk.rundir import MANIFEST, RECIPE, read_manifest, sound
from halve.model.card import CARD, DEQUANTIZED, license_of
from halve.recipe import strict_yaml
from halve.recipe.rounds import named, parsed
from halve.report import aligned, charts, sections, written
from halve.report.paper_numbers import paper_models
from halve.report.plots import figure
from halve.report.searched import searched
from halve.report.sections import PageSection, Table
from halve.report.task_tables import task_sections

STAGES = ("correct", "score", "search", "prune", "nest", "cache", "distill", "align", "evaluate")
"""In the order of the page; their variants, such as distill-ce, follow them."""

READS = ("plan.json", "scores.safetensors", "metrics.jsonl", "results.json", f"model/{CARD}")
"""The files of a stage from which the page is made."""

PATHS = frozenset(
    {"model", "train", "valid", "sources", "depth_task", "choices", "data", "file", "reward_model"}
)  # fmt: skip
"""Keys of a recipe, in whichever section, that hold paths or names, or under which such keys stand."""

_SHORT = ("Quality",)
"""Sections whose differences the card leaves to the page."""

_PAGE = "report.html.j2"
_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("halve", "templates"),
    autoescape=jinja2.select_autoescape(("html.j2",)),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class RoundCut:
    """The scores and the plan of a round. What has not finished is None or empty."""

    plan: Mapping[str, Any] | None
    scores: Mapping[str, Any] | None
    about_scores: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The contents of a run folder. Parts of stages that have not finished are empty or None."""

    recipe: Mapping[str, Any]
    manifests: Mapping[str, Mapping[str, Any]]
    cuts: tuple[RoundCut, ...]
    results: Mapping[str, Any] | None
    searches: Mapping[int, Mapping[str, Any]]
    """By round, what its search found."""
    logs: Mapping[str, Sequence[Mapping[str, Any]]]
    license: Mapping[str, str]


def write_report(run: Path, out: Path) -> None:
    """Write `out/report.html` and the model card `out/README.md` from the run folder `run`.

    Raises `RunError` if `run` holds no recipe or a file that cannot be read, and names the file.
    """
    view = _view(read_run(run))
    for template, name in ((_PAGE, "report.html"), ("card.md.j2", "README.md")):
        _write(template, view, Path(out) / name)


def write_page(run: Path, path: Path) -> None:
    """Write only the page, of what has finished so far. Raises what `write_report` raises."""
    _write(_PAGE, _view(read_run(run)), path)


def _write(template: str, view: Mapping[str, Any], path: Path) -> None:
    text = _PAGES.get_template(template).render(view)
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def read_run(run: Path) -> Run:
    """Read a run folder, finished stages only."""
    run = Path(run)
    manifests = {path.parent.name: read_manifest(path.parent) for path in sorted(run.glob(f"[!.]*/{MANIFEST}"))}
    manifests = {name: manifests[name] for name in sorted(manifests, key=_order) if name != "report"}

    def file(stage: str, name: str) -> Path | None:
        assert name in READS
        if name not in manifests.get(stage, {}).get("files", {}):
            return None
        return sound(run / stage, manifests[stage], name)

    def part(stage: str, name: str) -> Any:
        path = file(stage, name)
        return None if path is None else read_json(path)

    def cut(number: int) -> RoundCut:
        # after the cut the scores that ranked it, with the recipe's aggregators; before it those of the score stage
        files = [file(stage, "scores.safetensors") for stage in (named("prune", number), named("score", number))]
        scores, about = next((_scores(path) for path in files if path is not None), (None, {}))
        return RoundCut(part(named("prune", number), "plan.json"), scores, about)

    logs = {
        _model_name(stage): _lines(path) for stage in manifests if (path := file(stage, "metrics.jsonl")) is not None
    }
    recipe = read_object(run / RECIPE)
    cards = [card for stage in manifests if (card := file(stage, f"model/{CARD}")) is not None]
    license = license_of(cards[0].parent) if cards else {}
    numbers = range(1, 1 + _num_rounds(recipe))
    cuts = tuple(cut(number) for number in numbers)
    found = {number: part(named("search", number), "results.json") for number in numbers}
    searches = {number: facts for number, facts in found.items() if facts is not None}
    return Run(recipe, manifests, cuts, part("evaluate", "results.json"), searches, logs, license)


def _num_rounds(recipe: Mapping[str, Any]) -> int:
    return max(1 + len(recipe.get("then") or ()), len((recipe.get("search") or {}).get("targets") or ()))


def _order(stage: str) -> tuple[bool, int, int, str]:
    """Round by round, and in the order of `STAGES` within a round. Alignment and the run's evaluation come last."""
    base, number, variant = parsed(stage)
    place = STAGES.index(base) if base in STAGES else len(STAGES)
    last = place >= STAGES.index("align")
    return (last, place, number, variant) if last else (last, number, place, variant)


def _model_name(stage: str) -> str:
    """The name in the evaluation of the model that a training stage makes."""
    base, number, variant = parsed(stage)
    if base == "align":
        return named(sections.ALIGNED, number, variant)
    return named(variant or {"correct": "corrected", "distill": sections.SUBJECT}.get(base, base), number)


def _scores(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with safe_open(path, framework="numpy") as file:
        about = plain_json.parse_json((file.metadata() or {}).get("about", "{}"))
        axes = [axis for axis in ("layers", "hidden", "ffn", "heads", "kv_heads") if axis in file.keys()]  # noqa: SIM118
        return {axis: file.get_tensor(axis) for axis in axes}, about


def _lines(path: Path) -> list[dict[str, Any]]:
    return [plain_json.parse_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _view(run: Run) -> dict[str, Any]:
    """What the templates show."""
    pair = sections.first_and_last(run.results)
    name = str(run.recipe["name"])
    plans = tuple(cut.plan for cut in run.cuts if cut.plan is not None)
    of_tasks = task_sections(run.results, paper_models(str(run.recipe["model"]), plans))
    page_sections = (
        sections.quality(run.results),
        *of_tasks,
        sections.sizes_section(plans, run.results),
        sections.speed(run.results),
        aligned.alignment(run.manifests, run.results, run.logs),
        *(
            searched(facts, run.recipe, title=_numbered("Which shape", number))
            for number, facts in run.searches.items()
        ),
        charts.learning_curves(run.logs),
        charts.gates(run.logs, _gates(run)),
        *(
            charts.importance(cut.scores, cut.about_scores, cut.plan, title=_numbered("Importance", number))
            for number, cut in enumerate(run.cuts, 1)
        ),
        written.completions(run.results),
        written.chat_answers(run.results),
    )
    versions: Mapping[str, str] = next(
        (m["versions"] for m in reversed(list(run.manifests.values())) if m.get("versions")), {}
    )
    model = str(run.recipe["model"])
    headline = f"A run of {name}"
    if pair is not None:
        headline = f"From {figure(pair[0]['params'])} parameters to {figure(pair[1]['params'])}"
    return {
        "name": name,
        "headline": headline,
        "lead": _lead(run),
        "aligned": bool(run.recipe.get("align")),
        "tiles": [{"unit": "", "factor": ""} | tile for tile in sections.tiles(run.results)],
        "sections": [section for section in page_sections if section is not None],
        "recipe_yaml": strict_yaml.dump(_shown(run.recipe)).rstrip(),
        "stages": [_stage(stage, manifest) for stage, manifest in run.manifests.items()],
        "facts": _provenance(run, versions),
        "version": versions.get("halve", ""),
        "teacher": _short(model),
        "base_model": model if model.count("/") == 1 and not model.startswith((".", "/", "~")) else "",
        "dequantized": DEQUANTIZED.format(_short(model)) if is_gguf(model) else "",
        "license": strict_yaml.dump(dict(run.license)).rstrip() if run.license else "",
        "tables": [
            _markdown(section)
            for section in page_sections[: 4 + len(of_tasks)]
            if section is not None and section.table
        ],
    }


def _gates(run: Run) -> dict[str, Mapping[str, Any]]:
    """By trained model, the tasks that were asked during its distillation."""
    metrics = {stage: manifest.get("metrics") or {} for stage, manifest in run.manifests.items()}
    return {_model_name(stage): found["gates"] for stage, found in metrics.items() if "gates" in found}


def _numbered(title: str, number: int) -> str:
    return title if number == 1 else f"{title}, round {number}"


def _lead(run: Run) -> list[tuple[str, bool]]:
    """The run in two sentences, as (text, is strong) pieces."""
    pair = sections.first_and_last(run.results)
    if run.results is None or pair is None:
        return []
    before, after = pair
    kept = sections.share(after["non_embedding_params"], before["non_embedding_params"])
    pieces = [(kept, True), (f" of the non-embedding parameters of {_short(str(run.recipe['model']))} remain. ", False)]
    last = sections.subject(run.results) or ""
    subjects = {sections.SUBJECT: "distilled student", sections.ALIGNED: "aligned student"}
    subject = subjects.get(sections.color(last), "pruned model")
    bpb = sections.estimate(after["bits_per_byte"])
    pm = f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{bpb.error}" if bpb.error else ""
    pieces += [(f"The {subject} needs ", False), (f"{bpb.value}{pm}", True), (" bits per byte", False)]
    cut = named("pruned", len(run.cuts) if sections.color(last) == sections.ALIGNED else parsed(last)[1])
    others = [
        f"{sections.estimate(model['bits_per_byte']).value} {words}"
        for name, words in ((cut, "straight after the cut"), (run.results["reference"], "for its teacher"))
        if (model := run.results["models"].get(name)) is not None and model is not after
    ]
    against = f", against {' and '.join(others)}" if others else ""
    return [*pieces, (f"{against}.", False)]


def _stage(stage: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    files = manifest.get("files") or {}
    return {
        "name": stage,
        "key": str(manifest.get("key", ""))[:12],
        "seed": manifest.get("seed", ""),
        "files": len(files),
        "size": sections.short_bytes(sum(entry["size"] for entry in files.values())) if files else "-",
    }


def _provenance(run: Run, versions: Mapping[str, str]) -> list[tuple[str, str]]:
    facts = [(name, version) for name, version in versions.items()]
    for number, cut in enumerate(run.cuts, 1):
        if cut.about_scores.get("model"):
            facts.append((_numbered("scored weights", number), cut.about_scores["model"]))
            facts.append((_numbered("calibration samples", number), cut.about_scores["samples"]))
    if run.results is not None:
        facts.append(("held-out tokens", str(run.results["samples"]["fingerprint"])))
        facts.append(("machine", sections.machine_words(run.results["machine"])))
    steps = [stage for stage in reversed(list(run.manifests)) if parsed(stage)[0] == "align"]
    trained = (named(base, number) for number in range(len(run.cuts), 0, -1) for base in ("distill", "prune"))
    for stage in (*steps, *trained):
        files = (run.manifests.get(stage) or {}).get("files") or {}
        facts += [(f"{stage}/{name}", f["sha256"]) for name, f in files.items() if name.endswith(".safetensors")]
    return facts


def _shown(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without keys that are not set, and without folder names, which may be private."""
    shown: dict[str, Any] = _set(recipe)
    return {key: part for key, part in shown.items() if part or key not in ("nest", "then", "align")}


def _set(part: Any, *, path: bool = False) -> Any:
    """What is set in a part of the recipe. `path`: its texts are paths."""
    if isinstance(part, Mapping):
        return {key: _set(value, path=path or key in PATHS) for key, value in part.items() if value is not None}
    if isinstance(part, list):
        return [_set(item, path=path) for item in part]
    return _short(part) if path and isinstance(part, str) else part


def _short(text: str) -> str:
    return Path(text).name if text.startswith(("/", "~")) or Path(text).is_absolute() else text


def _markdown(section: PageSection) -> dict[str, str]:
    assert section.table is not None
    text = _markdown_table(section.table)
    if section.second is not None and section.title not in _SHORT:
        text += f"\n\n{section.between}\n\n{_markdown_table(section.second)}"
    return {"title": section.title, "note": section.note, "text": text}


def _markdown_table(table: Table) -> str:
    lines = ["| " + " | ".join(table.head) + " |", "|---" + "|---:" * (len(table.head) - 1) + "|"]
    for row in table.rows:
        cells = [
            "<br>".join(f"{one.value} ± {one.error}" if one.error else one.value for one in (cell, cell.under) if one)
            for cell in row.cells
        ]
        label = f"**{row.label}**" if row.subject else row.label
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)
