"""Sections of tasks: the layout of the papers' Tables 1 and 2, and differences of models on the same items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from halve.recipe.evaluations import SuiteName
from halve.report.paper_numbers import PaperModel
from halve.report.plots import figure
from halve.report.sections import Cell, Facts, PageSection, Table, TableRow, color, estimate, label, subject

_TITLES: Mapping[SuiteName, str] = {
    "minitron-base": "Base tasks, as in Table 1",
    "minitron-instruct": "Instruct tasks, as in Table 2",
}
_SINGLE = "Tasks"


def task_sections(results: Facts | None, papers: Sequence[PaperModel]) -> list[PageSection]:
    """A section for each suite of the run, and one for its single tasks."""
    tasks = (results or {}).get("tasks")
    made = [section for section in (_of_tools(results, papers),) if section is not None]
    if results is None or not tasks:
        return made
    for suite, listed in _by_suite(tasks).items():
        between, second = _differences(results, listed)
        table = _table(results, listed, suite, papers)
        made.append(PageSection(_TITLES.get(suite, _SINGLE), _note(tasks, listed, papers), table, between, second))  # type: ignore[call-overload]
    return made


_TOOLS = {"mt_bench": "MT-Bench", "bfcl": "BFCL (live)", "chatrag": "ChatRAG"}


def _of_tools(results: Facts | None, papers: Sequence[PaperModel]) -> PageSection | None:
    """Scores that other tools measured, with their versions."""
    entries = (results or {}).get("imported")
    if results is None or not entries:
        return None
    shown = [paper for paper in papers if paper.instruct]
    rows = []
    for tool in dict.fromkeys(entry["tool"] for entry in entries):
        mine = [entry for entry in entries if entry["tool"] == tool]
        by_model = {entry["model"]: estimate(entry) for entry in mine}
        cells = [by_model.get(name, Cell("-")) for name in results["models"]]
        theirs = [Cell(f"{paper.instruct[tool]}" if tool in paper.instruct else "-") for paper in shown]
        rows.append(TableRow(_TOOLS[tool], (*cells, *theirs)))
    versions = ", ".join(dict.fromkeys(f"{_TOOLS[entry['tool']]}: {entry['version']}" for entry in entries))
    note = f"Measured by other tools against an endpoint, and imported. Versions: {versions}."
    head = ("benchmark", *map(label, results["models"]), *(f"{paper.label}, in the paper" for paper in shown))
    return PageSection("Instruct benchmarks of other tools", note, Table(head, tuple(rows)))


def _by_suite(tasks: Facts) -> dict[str, list[Facts]]:
    """The listed tasks by suite; "" holds those of no suite."""
    grouped: dict[str, list[Facts]] = {}
    for entry in tasks["listed"]:
        for suite in entry["suites"] or [""]:
            grouped.setdefault(suite, []).append(entry)
    return grouped


def _table(results: Facts, listed: Sequence[Facts], suite: str, papers: Sequence[PaperModel]) -> Table:
    """Benchmarks in rows and models in columns, as in the papers. Scores are in percent."""
    names = list(results["models"])
    numbers = [(paper, paper.instruct if suite == "minitron-instruct" else paper.base) for paper in papers if suite]
    shown = [(paper, own) for paper, own in numbers if own]
    rows = []
    for words, key in (("Total params", "params"), ("Non-emb. params", "non_embedding_params")):
        cells = [Cell(figure(results["models"][name][key])) for name in names]
        rows.append(TableRow(words, (*cells, *(Cell("") for _ in shown))))
    for entry in listed:
        cells = [task_score(results["tasks"], name, entry) for name in names]
        theirs = [Cell(f"{own[entry['task']]:.1f}" if entry["task"] in own else "-") for _, own in shown]
        rows.append(TableRow(with_shots(entry), (*cells, *theirs)))
    head = ("benchmark (shots)", *map(label, names), *(f"{paper.label}, in the paper" for paper, _ in shown))
    return Table(head, tuple(rows))


def with_shots(entry: Facts) -> str:
    """The name of a listed task in the papers' tables, and its shots."""
    return f"{entry['title'] or entry['task']} ({entry['shots']})"


def task_score(tasks: Facts, name: str, entry: Facts) -> Cell:
    """What a model scored in a listed task, in percent, or why it was not asked."""
    if entry["status"] != "asked":
        return Cell(entry["status"])
    return estimate(tasks["scores"][name][entry["key"]].get(entry["metric"]), percent=True)


def _note(tasks: Facts, listed: Sequence[Facts], papers: Sequence[PaperModel]) -> str:
    settings = tasks["settings"]
    asked = [entry for entry in listed if entry["status"] == "asked"]
    words = [f"Tasks of lm-evaluation-harness {tasks['harness']}, in percent, with one standard error."]
    if asked:
        words.append(f"{', '.join(map(_counts, asked))}.")
    words.append(f"add_bos_token is {settings['add_bos_token']}.")
    if settings["limit"]:
        words.append(f"At most {settings['limit']} items of each task were asked.")
    if settings["chat_template"]:
        turns = "as turns" if settings["fewshot_as_turns"] else "in one message"
        words.append(f"Prompts go through the chat template, with examples {turns}.")
    borrowed = [entry["key"] for entry in asked if "not asked" in entry["examples"]]
    if borrowed:
        words.append(f"The examples of {', '.join(borrowed)} are the last of its rows, which are not asked.")
    words += list(_changed(tasks, asked))
    words += [f"{entry['key']}: {entry['status']}, {entry['why']}." for entry in listed if entry["status"] != "asked"]
    if papers:
        words.append("Columns of the paper have its own numbers, from 2408.11796 (anonymous revision).")
    return " ".join(words)


def _counts(entry: Facts) -> str:
    words = f"{entry['key']}: {entry['items']} items by {entry['metric']}"
    if entry.get("cut"):  # results of older versions do not say
        words += f" ({entry['cut']} prompts did not fit into the context and lost their beginning)"
    return words


def _changed(tasks: Facts, asked: Sequence[Facts]) -> Iterator[str]:
    """Which items are answered differently in batches of another size, where that was measured."""
    by_key = tasks.get("changed_by_batch")
    if by_key is None:
        return
    several = {entry["key"]: by_key[entry["key"]] for entry in asked if by_key.get(entry["key"])}
    if not several:
        yield f"Batches of 1 and of {tasks['settings']['batch']} give the same answers."
    for key, items in several.items():
        named = ", ".join(f"{item['part']} {item['item']}" for item in items[:20])
        yield f"In batches of 1 another answer is given to {len(items)} items of {key}: {named}."


def _differences(results: Facts, listed: Sequence[Facts]) -> tuple[str, Table | None]:
    against = results["tasks"]["differences"]
    asked = [entry for entry in listed if entry["status"] == "asked"]
    if not against or not asked:
        return "", None
    rows = []
    for name, by_task in against.items():
        cells = tuple(_difference(by_task[entry["key"]]) for entry in asked)
        rows.append(TableRow(f"minus {label(name)[0].lower()}{label(name)[1:]}", cells, color(name)))
    words = (
        "This table shows the student minus each other model on the same items, in percent, with the standard error of"
        " the pairs. p is that of McNemar's exact test, for tasks whose items are right or wrong. Colored values are"
        " over two standard errors away from zero."
    )
    own = label(subject(results) or "")
    return words, Table((own, *(entry["key"] for entry in asked)), tuple(rows))


def _difference(found: Mapping[str, Any]) -> Cell:
    cell = estimate(found, percent=True, signed=True)
    test = found.get("mcnemar")
    if test is None:
        return cell
    return Cell(cell.value, f"{cell.error or 0}, p {test['p']:.2g}", cell.clear)
