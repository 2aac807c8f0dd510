"""Ask a loaded model the tasks of a recipe, and keep the value of every item.

The harness's own wrapper runs the model, in this process. Two things differ from its defaults. Logits are computed by
halve's head in float32, also from bfloat16 weights. And the checkpoint's generation_config.json does not change how
answers are generated; only its end-of-text tokens count, beside the end of a turn in a chat template that is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from halve.disk.files import plain, read_json, write_json
from halve.errors import CorpusError, HalveError
from halve.evaluation import harness, programs
from halve.evaluation.building import build_task
from halve.evaluation.harness import Built, is_code
from halve.evaluation.metrics import figures_unread, is_of_items
from halve.evaluation.rows import PlacedRow, read_rows, split_files, wanted
from halve.evaluation.sandbox import Sandbox
from halve.evaluation.suites import TASKS_KEY, Ask, asked
from halve.evaluation.trying import try_items
from halve.model.head import split
from halve.model.measure import end_tokens
from halve.progress import SILENT, Progress
from halve.recipe.evaluations import Evaluate
from halve.text.day import fixed_day
from halve.text.turns import answer_ends

_AVERAGED = ("prompt_level_strict_acc", "prompt_level_loose_acc", "inst_level_strict_acc", "inst_level_loose_acc")
"""The metrics of ifeval. The papers show their mean (2408.11796, Table 2)."""


@dataclass(frozen=True)
class Left:
    """A task that is not asked, and why."""

    ask: Ask
    status: str
    why: str


@dataclass(frozen=True)
class Exam:
    """The tasks of a recipe with their rows, ready to be asked."""

    section: Evaluate
    built: tuple[Built, ...] = ()
    left: tuple[Left, ...] = ()
    sandbox: Sandbox | None = None


@dataclass
class Answered:
    """What one model answered to one task: for every metric a value for each item, in the order of `items`."""

    items: list[dict[str, Any]] = field(default_factory=list)
    """Part, number and hash of the request of each item."""
    values: dict[str, list[float]] = field(default_factory=dict)
    answers: list[Any] = field(default_factory=list)
    """The number of the likeliest choice, or the text."""
    cut: int = 0
    """Items whose prompt did not fit into the model's context and lost its beginning."""


def read_exam(section: Evaluate, *, context: int | None, key: str = TASKS_KEY) -> Exam:
    """Read the rows of every task of the recipe. `context` is the models' longest sequence, `key` names the tasks.

    A task without data, and one whose programs may not run, is left out and says so. Raises `CorpusError` for rows
    that are not the task's, `RecipeError` for an unknown task or a missing package, and `RunError` where programs may
    run but no sandbox can be had.
    """
    if not section.asks_tasks:
        return Exam(section)
    harness.require_harness(key)
    built: list[Built] = []
    left: list[Left] = []
    sandbox = None
    with harness.quiet_harness():
        for ask in asked(section, key):
            harness.require_task(ask)
            if ask.task not in section.data:
                left.append(Left(ask, "no data", f"it wants {wanted(ask.task)}"))
            elif is_code(ask) and not section.run_untrusted_code:
                left.append(Left(ask, "not run", "its answers are programs, and evaluate.run_untrusted_code is off"))
            else:
                if is_code(ask):
                    sandbox = sandbox or Sandbox.open()
                built.append(_built(ask, section, context=context))
    return Exam(section, tuple(built), tuple(left), sandbox)


def _built(ask: Ask, section: Evaluate, *, context: int | None) -> Built:
    return build_task(ask, _rows(ask, section), limit=section.limit, context=context)


def _rows(ask: Ask, section: Evaluate) -> dict[str, list[PlacedRow]]:
    """The rows of a task by split."""
    splits = split_files(Path(section.data[ask.task]))
    return {split: [row for file in files for row in read_rows(file, ask.task)] for split, files in splits.items()}


def answer(
    exam: Exam,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    batch: int | None = None,
    kept: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Answered]:
    """What the model answers to each task, by the task's key. Finished tasks are kept in the folder `kept`.

    `batch` overrides the section's.
    """
    done: dict[str, Answered] = {}
    if not exam.built:
        return done
    ends = (answer_ends if exam.section.chat_template else end_tokens)(model, tokenizer)
    with harness.quiet_harness() as lm_eval, _plain_generation(model, ends), programs.running_in(exam.sandbox):
        wrapped = _wrapped(lm_eval, model, tokenizer, exam.section, batch=batch or exam.section.task_batch)
        for number, built in enumerate(exam.built):
            file = None if kept is None else kept / f"{number}.json"
            if file is not None and file.exists():
                done[built.ask.key] = Answered(**read_json(file))
                continue
            torch.manual_seed(seed)
            answered = _ask(lm_eval, wrapped, built, exam.section)
            done[built.ask.key] = answered
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, plain(vars(answered)))
            progress.say(f"{built.ask.key}: {len(answered.items)} items{_told_cut(answered, wrapped.max_length)}")
    return done


def _wrapped(
    lm_eval: ModuleType, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: Evaluate, *, batch: int
) -> Any:
    """The harness's wrapper of a loaded model, with halve's head. Answers end after `max_new_tokens`."""
    own = deepcopy(tokenizer)  # the wrapper gives it a padding token
    wrapped = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=own, batch_size=batch)
    body, head = split(model)
    generate, most = wrapped._model_generate, section.max_new_tokens

    @torch.no_grad()
    def logits(ids_BS: torch.Tensor, attn_mask: None = None, labels: None = None) -> torch.Tensor:
        return head.logits(body(ids_BS))

    def shorter(context: torch.Tensor, max_length: int, stop: list[str], **how: Any) -> torch.Tensor:
        longest = max_length if most is None else min(max_length, context.shape[1] + most)
        made: torch.Tensor = generate(context=context, max_length=longest, stop=stop, **how)
        return made

    wrapped._model_call, wrapped._model_generate = logits, shorter
    return wrapped


@contextmanager
def _plain_generation(model: PreTrainedModel, ends: list[int] | None) -> Iterator[None]:
    before = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=ends)
    try:
        yield
    finally:
        model.generation_config = before


def _ask(lm_eval: ModuleType, wrapped: Any, built: Built, section: Evaluate) -> Answered:
    for part in built.parts.values():
        part.set_fewshot_seed(harness.FEWSHOT_SEED)
    with torch.no_grad(), fixed_day(), figures_unread(built.parts), _prompts_cut(wrapped, built.ask) as cut:
        results = lm_eval.evaluator.evaluate(
            wrapped,
            {"tasks": dict(built.parts)},
            bootstrap_iters=0,
            apply_chat_template=section.chat_template,
            fewshot_as_multiturn=section.fewshot_as_turns,
            confirm_run_unsafe_code=True,
        )
    answered = Answered()
    for name, samples in results["samples"].items():
        _gather(answered, built.parts[name], name, samples, cut)
    _pool(answered)
    return answered


@contextmanager
def _prompts_cut(wrapped: Any, ask: Ask) -> Iterator[set[str]]:
    """In this context prompts are collected that do not fit. The harness drops their beginning without a word.

    Raises `CorpusError` for a choice that does not fit by itself.
    """
    cut: set[str] = set()
    score, encode = wrapped._loglikelihood_tokens, wrapped.tok_batch_encode

    def scored(requests: Sequence[Any], **how: Any) -> Any:
        for (prompt, choice), context, continuation in requests:
            if len(continuation) > wrapped.max_length:
                raise CorpusError(
                    f"a choice of {ask.task} is longer than the model's context",
                    why=f"it has {len(continuation)} tokens, and the context {wrapped.max_length}",
                    fix=f"drop the row with the choice {choice[:40]!r}",
                )
            if len(context) + len(continuation) > wrapped.max_length + 1:  # the last token is not read
                cut.add(prompt)
        return score(requests, **how)

    def encoded(prompts: Sequence[str], left_truncate_len: int, **how: Any) -> Any:
        cut.update(prompt for prompt in prompts if len(wrapped.tok_encode(prompt)) > left_truncate_len)
        return encode(prompts, left_truncate_len=left_truncate_len, **how)

    with (
        mock.patch.object(wrapped, "_loglikelihood_tokens", scored),
        mock.patch.object(wrapped, "tok_batch_encode", encoded),
    ):
        yield cut


def _told_cut(answered: Answered, context: int) -> str:
    if not answered.cut:
        return ""
    return f"; the prompts of {answered.cut} lost their beginning, for they do not fit into {context} tokens"


def _gather(
    answered: Answered, part: Any, name: str, samples: Sequence[Mapping[str, Any]], cut: Set[str] = frozenset()
) -> None:
    """Add the samples of a part, which the harness lists once for each of its filters."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    for sample in samples:
        if sample["filter"] == filters[0]:
            arguments = json.dumps(sample["arguments"], sort_keys=True, default=str)
            request = hashlib.sha256(arguments.encode()).hexdigest()
            answered.items.append({"part": name, "item": sample["doc_id"], "request": request})
            answered.answers.append(_said(sample))
            answered.cut += any(prompt in cut for prompt, *_ in sample["arguments"])
        for metric in sample["metrics"]:
            if is_of_items(part, metric, sample[metric]):
                shown = metric if len(filters) == 1 else f"{metric},{sample['filter']}"
                answered.values.setdefault(shown, []).append(plain(sample[metric]))


def _said(sample: Mapping[str, Any]) -> Any:
    first = sample["resps"][0][0]
    if isinstance(first, str):
        return first
    likelihoods = [responses[0][0] for responses in sample["resps"]]
    return max(range(len(likelihoods)), key=likelihoods.__getitem__)


def _pool(answered: Answered) -> None:
    """Turn lists of verdicts into numbers whose mean is the share of all verdicts, and add ifeval's average.

    A metric that the harness gave to some items only is left out.
    """
    values: dict[str, list[Any]] = answered.values
    for name in [name for name, listed in values.items() if len(listed) < len(answered.items)]:
        del values[name]
    for name, listed in values.items():
        if any(isinstance(value, list) for value in listed):
            total = sum(len(value) for value in listed)
            values[name] = [sum(value) * len(listed) / total for value in listed]
        else:
            values[name] = [float(value) for value in listed]
    if all(name in values for name in _AVERAGED):
        values["average"] = [sum(four) / 4 for four in zip(*(values[name] for name in _AVERAGED), strict=True)]


def by_neighbors(built: Built, answered: Answered) -> Answered:
    """The values that the answers would get if each were given to the next item of its part.

    The model must have answered this task last. A part with a single item keeps its own answer.
    """
    moved = Answered()
    with harness.quiet_harness():
        for name, part in built.parts.items():
            texts = [text for item, text in zip(answered.items, answered.answers, strict=True) if item["part"] == name]
            for instance, text in zip(part.instances, [*texts[-1:], *texts[:-1]], strict=True):
                instance.resps, instance.filtered_resps = [text], {}
            part.apply_filters()
            samples = []
            for chosen in part.instances[0].filtered_resps:
                for instance in part.instances:
                    metrics = part.process_results(instance.doc, [instance.filtered_resps[chosen]])
                    about = {"filter": chosen, "doc_id": instance.doc_id, "arguments": [], "resps": [instance.resps]}
                    samples.append({**about, "metrics": list(metrics), **metrics})
            _gather(moved, part, name, samples)
    _pool(moved)
    return moved


def changed_items(one: Answered, other: Answered) -> list[dict[str, Any]]:
    """The items of a task whose answers differ."""
    pairs = zip(one.items, one.answers, other.answers, strict=True)
    return [item for item, answer_1, answer_2 in pairs if answer_1 != answer_2]


def errors_of(section: Evaluate, key: str = TASKS_KEY) -> Iterator[HalveError]:
    """What is wrong with the tasks of a recipe: unknown names, missing files, rows that are not the task's.

    `key` is the recipe's key that names the tasks. If names and files are sound, every item is made and scored once
    without a model.
    """
    if not section.asks_tasks:
        return
    try:
        harness.require_harness(key)
    except HalveError as error:
        yield error
        return
    sound = True
    for ask in asked(section, key):
        try:
            harness.require_task(ask)
            if ask.task in section.data:
                _rows(ask, section)
        except HalveError as error:
            sound = False
            yield error
    if sound and section.data:
        yield from _errors_of_items(section, key)


def _errors_of_items(section: Evaluate, key: str) -> list[HalveError]:
    errors = []
    with harness.quiet_harness():
        for ask in asked(section, key):
            try:
                if ask.task in section.data:
                    try_items(_built(ask, section, context=None))
            except HalveError as error:
                errors.append(error)
    return errors
