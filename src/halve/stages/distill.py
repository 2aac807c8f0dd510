"""The distill stage: the student is trained on the teacher's distribution to recover from the cut.

The variants have the same tokens, the same order and the same loop. Each differs from the student in one thing:

    student        the pruned model, trained with the recipe's objective
    ce             the pruned model, trained with cross-entropy alone
    random_init    the pruned model's sizes with random weights
    random_prune   a model whose kept parts were chosen at random (made by the prune stage)

With `correct.when: beside` the teacher is trained too, by cross-entropy on the same samples. `ce` needs no teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from halve.anatomy.configs import context_length
from halve.anatomy.work import FlopsPerToken, by_context, distilling, learning
from halve.evaluation.gates import TaskGate
from halve.model.card import name_of
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.head import Head, split
from halve.progress import SILENT, Progress
from halve.recipe.schema import Distill, Recipe
from halve.stages.smaller import NEST, flops_of, open_nest, save_nest, with_smaller
from halve.text.documents import require_apart
from halve.text.opened import Text, open_text
from halve.train.beside import Correction, correction
from halve.train.loop import adapters, loop
from halve.train.nested import NestedStudents, Once
from halve.train.objectives import intermediate
from halve.train.objectives import logits as objectives
from halve.train.objectives.stored import from_store
from halve.train.ranks import shards
from halve.train.ranks.group import Ranks, here
from halve.train.teachers import answers
from halve.train.teachers import live as teachers
from halve.train.teachers.cache import HELDOUT, CachedHidden, Store
from halve.train.teachers.live import Hidden, Live, Teacher

VARIANTS = ("student", "ce", "random_init", "random_prune")


@dataclass(frozen=True)
class _Setting:
    """The parts of a distillation that do not depend on the source of the answers."""

    recipe: Recipe
    training: Distill
    variant: str
    text: Text
    device: str
    ranks: Ranks

    @property
    def corrects(self) -> bool:
        """Whether the teacher is corrected in the same loop."""
        return self.recipe.corrects_beside and self.variant != "ce"

    @property
    def half(self) -> bool:
        """Whether matrix products are computed in bfloat16."""
        return loop.is_half(self.training, self.device)

    @property
    def micro_batch(self) -> int:
        """Samples per forward pass."""
        return self.training.micro_batch or self.training.batch

    @property
    def name(self) -> str:
        """The name of the training."""
        return "distill" if self.variant == "student" else f"distill-{self.variant}"


@dataclass(frozen=True)
class _Taught:
    """The source of the teacher's answers: a loaded model or a cache. In both cases its head is loaded."""

    by: Live | Store | Correction
    head: Head
    heldout: Teacher[Hidden]
    model: PreTrainedModel | None = None
    dtype: torch.dtype | None = None
    """If the teacher is corrected: the original precision of its weights."""


def run(
    recipe: Recipe,
    *,
    teacher: Checkpoint,
    student: Checkpoint,
    variant: str,
    cache: Path,
    out: Path,
    answers_in: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write the trained student to `out/model` and its training log to `out/metrics.jsonl`.

    Checks before the first step: the teacher's cross-entropy is plausible, its divergence from itself is zero, the
    vocabularies are aligned, and the student's loss is finite. The teacher only runs forward, unless it is corrected
    beside; `out/teacher` then is the corrected teacher. Models keep the precision of their checkpoints. `cache` is the
    run's folder of token files. A killed run resumes from what it left in `out`. If the recipe uses a cache,
    `answers_in` is the result of the cache stage, and the teacher is not loaded. Raises `TrainError` if a check fails,
    and `CorpusError`.
    """
    assert recipe.distill is not None
    assert variant in VARIANTS
    training, device, ranks = recipe.distill, resolve_device(recipe.device), here()
    text = open_text(recipe, training, teacher, student, cache=cache, progress=progress)
    how = _Setting(recipe, training, variant, text, device, ranks)
    digest = ranks.lead(lambda: teacher.fingerprint)  # of gigabytes, which one rank reads
    taught = _teacher(how, teacher, digest, answers_in)
    model = _start(how, student)
    own_dtype = model.dtype
    vocab = _vocab(how, taught, model)
    if how.corrects:
        taught = _corrected(how, taught)
    lesson, teacher_ce = _lesson(how, taught, model, vocab=vocab, work=_flops(how, teacher, student))
    nest = _nest(how, model, student)
    if nest is not None:
        lesson = with_smaller(lesson, nest, recipe, flops=flops_of(nest, student.anatomy, teacher.anatomy, recipe))
    gate = _gate(how, taught, teacher, file=out / ".gates.json", progress=progress)
    lesson = replace(lesson, gate=gate)
    files = loop.TrainFiles(out / ".checkpoints", out / "metrics.jsonl", recipe.seed, how.name)
    result = loop.train(model, lesson, text.course, files, device=device, ranks=ranks, progress=progress)
    metrics = {"variant": variant, "teacher_ce": teacher_ce, **result.as_dict()}
    if gate is not None:
        metrics["gates"] = gate.told()
    record = {
        "stage": "distill",
        "base_model": name_of(recipe.model),
        "teacher": digest,
        "student": ranks.lead(lambda: student.fingerprint),
        "seed": recipe.seed,
        "corpus": text.course.fingerprint,
        "training": training.model_dump(mode="json"),
        **metrics,
    }
    if nest is not None:
        save_nest(nest, recipe, out, dtype=own_dtype, student=student, record=record, ranks=ranks)
    if how.corrects:
        _save_teacher(how, taught, out / "teacher", source=teacher.files, record=record)
    shards.save(model, out / "model", dtype=own_dtype, extra_from=student.files, record=record, ranks=ranks)
    return metrics


def _gate(how: _Setting, taught: _Taught, teacher: Checkpoint, *, file: Path, progress: Progress) -> TaskGate | None:
    """The gates of the student's training, armed by the teacher. Controls have none."""
    gates, recipe = how.training.gates, how.recipe
    if gates is None or how.variant != "student":
        return None
    context = context_length(teacher.config)
    gate = TaskGate.of(
        gates, recipe.evaluate, how.text.tokenizer, context=context, file=file, seed=recipe.seed, progress=progress
    )
    if gate.needs_teacher:
        model = taught.model if taught.model is not None else teacher.load_to_run(dtype=recipe.dtype, device=how.device)
        with loop.autocast(how.training, how.device):
            gate.arm(model)
    return gate


def _teacher(how: _Setting, teacher: Checkpoint, digest: str, answers_in: Path | None) -> _Taught:
    """The teacher before the first step. `digest` is its fingerprint."""
    if how.corrects:
        return _by_learner(how, teacher)
    return _by_model(how, teacher) if answers_in is None else _by_cache(how, answers_in, digest)


def _lesson(
    how: _Setting, taught: _Taught, student: PreTrainedModel, *, vocab: int, work: FlopsPerToken
) -> tuple[loop.Lesson, float]:
    """The student's lesson, and the cross-entropy of the teacher. Checks before that the teacher can teach."""
    objective, extra = _objective(how, taught, student, vocab=vocab)
    if isinstance(taught.by, Live) and taught.model is not None and teachers.stays(how.training):
        shards.frozen(taught.model, taught.by.body, how.training, half=how.half, ranks=how.ranks)
    teacher_ce = _examined(how, taught, vocab=vocab)
    beside = taught.by if isinstance(taught.by, Correction) else None
    return loop.Lesson(objective, extra, beside, _figures(how, taught, vocab=vocab), work), teacher_ce


def _vocab(how: _Setting, taught: _Taught, student: PreTrainedModel) -> int:
    """The size of the shared vocabulary. Also checks that both models keep documents apart, if required."""
    if how.recipe.data.documents == "apart":
        for model in (taught.model, student):
            if model is not None:
                require_apart(model)
    # tokens that were added only to the tokenizer do not occur in the text
    num_tokens = min(1 + max(how.text.tokenizer.get_vocab().values()), taught.head.weight.shape[0])
    vocab = objectives.shared_vocab(split(student)[1], taught.head, num_tokens=num_tokens)
    if isinstance(taught.by, Store):
        taught.by.require_vocab(vocab)
    return vocab


def _examined(how: _Setting, taught: _Taught, *, vocab: int) -> float:
    """Check that the teacher can teach, and return its cross-entropy."""
    by = taught.by
    if isinstance(by, Store):
        return by.facts.ce
    body, head = (by.body, by.head) if isinstance(by, Live) else (by.learner.body, by.learner.head())
    with loop.autocast(how.training, how.device):
        heldout, micro_batch = how.text.heldout, how.micro_batch
        teacher_ce = objectives.check_teacher(by, body, head, heldout, vocab=vocab, micro_batch=micro_batch)
    if isinstance(by, Correction):
        by.learner.rest()
    return teacher_ce


def _figures(how: _Setting, taught: _Taught, *, vocab: int) -> objectives.Heldout:
    """The held-out measurements during training."""
    heldout, micro_batch = how.text.heldout, how.micro_batch
    figures = objectives.heldout_divergence(taught.heldout, heldout, vocab=vocab, micro_batch=micro_batch)
    if isinstance(taught.by, Correction):
        return taught.by.measuring(figures, objectives.heldout_loss(heldout, micro_batch=micro_batch))
    return figures


def _flops(how: _Setting, teacher: Checkpoint, student: Checkpoint) -> FlopsPerToken:
    if how.variant == "ce" or not objectives.teacher_terms(how.training):
        return by_context(learning, student.anatomy)
    return by_context(partial(distilling, training=how.training), student.anatomy, teacher.anatomy)


def _by_model(how: _Setting, teacher: Checkpoint) -> _Taught:
    in_shards = teachers.stays(how.training) and how.training.shard_teacher and not how.ranks.alone
    model, live = teachers.load_teacher(
        teacher, how.training, dtype=how.recipe.dtype, device=how.device, half=how.half, in_shards=in_shards
    )
    return _Taught(live, live.head, live, model)


def _by_learner(how: _Setting, teacher: Checkpoint) -> _Taught:
    """The teacher before its correction."""
    model = teacher.load(dtype=how.recipe.dtype, device=how.ranks.home(how.device))
    own_dtype = model.dtype
    if not how.half:
        model.float()
    live = Live(*split(model))
    return _Taught(live, live.head, live, model, own_dtype)


def _corrected(how: _Setting, taught: _Taught) -> _Taught:
    """The same, with a correction by the section `correct`."""
    section, model = how.recipe.correct, taught.model
    assert section is not None
    assert model is not None
    adapters.choose_trained(model, section, seed=how.recipe.seed)
    by = correction(model, section, how.training, how.text.course, device=how.device, ranks=how.ranks)
    return replace(taught, by=by, heldout=by)


def _save_teacher(how: _Setting, taught: _Taught, folder: Path, *, source: Path, record: Mapping[str, Any]) -> None:
    assert how.recipe.correct is not None
    assert taught.model is not None
    assert taught.dtype is not None
    kept = {key: record[key] for key in ("base_model", "teacher", "seed", "corpus")}
    teacher_record = {"stage": "correct", **kept, "training": how.recipe.correct.model_dump(mode="json")}
    adapters.merge(taught.model)
    shards.save(taught.model, folder, dtype=taught.dtype, extra_from=source, record=teacher_record, ranks=how.ranks)


def _by_cache(how: _Setting, folder: Path, teacher: str) -> _Taught:
    store = answers.open_store(folder, how.recipe, how.training, teacher=teacher, text=how.text)
    head = store.head(how.device)
    return _Taught(store, head, CachedHidden(store, head, HELDOUT))


def _objective(
    how: _Setting, taught: _Taught, student: PreTrainedModel, *, vocab: int
) -> tuple[objectives.Objective, nn.Module | None]:
    """The objective of this variant, and its own trained parameters."""
    training = how.training
    terms, ce = objectives.teacher_terms(training), training.terms.get("ce", 0.0)
    if how.variant == "ce" or not terms:
        return objectives.cross_entropy(), None
    if isinstance(taught.by, Store):
        return from_store(taught.by, taught.head, training, vocab=vocab), None
    teacher = taught.by if how.recipe.nest is None else Once(taught.by)
    logits = objectives.distillation(teacher, vocab=vocab, terms=terms, ce=ce)
    states = training.intermediate
    if states is None:
        return logits, None
    assert taught.model is not None
    matching = intermediate.match(
        student, taught.model, states=states.states, layers=states.layers, seed=how.recipe.seed
    )
    return intermediate.with_states(logits, matching, alpha=states.alpha), matching.map


def _nest(how: _Setting, model: PreTrainedModel, student: Checkpoint) -> NestedStudents | None:
    """The students inside the student, if the recipe has some. The nest stage wrote them beside its model."""
    if how.recipe.nest is None:
        return None
    return open_nest(model, student.anatomy, student.files.parent / NEST)


def _start(how: _Setting, checkpoint: Checkpoint) -> PreTrainedModel:
    """Load the student. For a random start, draw weights with its shapes and precision."""
    model = checkpoint.load(dtype=how.recipe.dtype, device=how.ranks.home(how.device))
    if how.variant != "random_init":
        return model
    with torch.random.fork_rng(devices=[]):  # the draw depends on the seed alone and affects no other random numbers
        torch.manual_seed(how.recipe.seed)
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(checkpoint.config, dtype=torch.float32)
    return fresh.to(device=model.device, dtype=model.dtype)
