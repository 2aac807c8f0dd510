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

from halve.anatomy.work import FlopsPerToken, by_context, distilling, learning
from halve.model.card import name_of
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.head import Head, split
from halve.progress import SILENT, Progress
from halve.recipe.schema import Distill, Dtype, Recipe
from halve.text.batch import Batch
from halve.text.course import Course
from halve.text.documents import require_apart
from halve.text.opened import Text, open_text
from halve.train.beside import Correction, correction
from halve.train.loop import adapters, loop
from halve.train.objectives import intermediate
from halve.train.objectives import logits as objectives
from halve.train.ranks import shards
from halve.train.ranks.group import here
from halve.train.teachers import answers
from halve.train.teachers import live as teachers
from halve.train.teachers.cache import HELDOUT, CachedDraws, CachedHidden, Store
from halve.train.teachers.live import Hidden, Live, Teacher

VARIANTS = ("student", "ce", "random_init", "random_prune")


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
    training, device = recipe.distill, resolve_device(recipe.device)
    text = open_text(recipe, training, teacher, student, cache=cache, progress=progress)
    digest = here().lead(lambda: teacher.fingerprint)  # of gigabytes, which one rank reads
    corrects = recipe.corrects_beside and variant != "ce"
    if corrects:
        taught = _by_learner(recipe, training, teacher, device=device)
    elif answers_in is None:
        taught = _by_model(recipe, training, teacher, device=device)
    else:
        taught = _by_cache(recipe, training, answers_in, digest, text, device=device)
    model = _start(student, variant, seed=recipe.seed, dtype=recipe.dtype, device=device)
    own_dtype = model.dtype
    vocab = _vocab(recipe, taught, model, text)
    if corrects:
        taught = _corrected(recipe, training, taught, text.course, device=device)
    objective, extra = _objective(training, taught, model, variant=variant, vocab=vocab, seed=recipe.seed)
    if isinstance(taught.by, Live) and taught.model is not None and teachers.stays(training):
        shards.frozen(taught.model, taught.by.body, training, half=loop.is_half(training, device))
    teacher_ce = _examined(training, taught, text.heldout, vocab=vocab, device=device)
    result = loop.train(
        model,
        objective,
        text.course,
        seed=recipe.seed,
        device=device,
        work=out / ".checkpoints",
        metrics=out / "metrics.jsonl",
        progress=progress,
        heldout=_figures(training, taught, text.heldout, vocab=vocab),
        extra=extra,
        beside=taught.by if isinstance(taught.by, Correction) else None,
        flops=_flops(training, teacher, student, variant=variant),
        name="distill" if variant == "student" else f"distill-{variant}",
    )
    metrics = {"variant": variant, "teacher_ce": teacher_ce, **result.as_dict()}
    record = {
        "stage": "distill",
        "base_model": name_of(recipe.model),
        "teacher": digest,
        "student": here().lead(lambda: student.fingerprint),
        "seed": recipe.seed,
        "corpus": text.course.fingerprint,
        "training": training.model_dump(mode="json"),
        **metrics,
    }
    if corrects:
        _save_teacher(recipe, taught, out / "teacher", source=teacher.files, record=record)
    shards.save(model, out / "model", dtype=own_dtype, extra_from=student.files, record=record)
    return metrics


def _vocab(recipe: Recipe, taught: _Taught, student: PreTrainedModel, text: Text) -> int:
    """The size of the shared vocabulary. Also checks that both models keep documents apart, if required."""
    if recipe.data.documents == "apart":
        for one in (taught.model, student):
            if one is not None:
                require_apart(one)
    # tokens that were added only to the tokenizer do not occur in the text
    num_tokens = min(1 + max(text.tokenizer.get_vocab().values()), taught.head.weight.shape[0])
    vocab = objectives.shared_vocab(split(student)[1], taught.head, num_tokens=num_tokens)
    if isinstance(taught.by, Store):
        taught.by.require_vocab(vocab)
    return vocab


def _examined(training: Distill, taught: _Taught, heldout: Batch, *, vocab: int, device: str) -> float:
    """Check that the teacher can teach, and return its cross-entropy."""
    by = taught.by
    if isinstance(by, Store):
        return by.facts.ce
    body, head = (by.body, by.head) if isinstance(by, Live) else (by.learner.body, by.learner.head())
    with loop.autocast(training, device):
        micro_batch = training.micro_batch or training.batch
        teacher_ce = objectives.check_teacher(by, body, head, heldout, vocab=vocab, micro_batch=micro_batch)
    if isinstance(by, Correction):
        by.learner.rest()
    return teacher_ce


def _figures(training: Distill, taught: _Taught, heldout: Batch, *, vocab: int) -> objectives.Heldout:
    """The held-out measurements during training."""
    micro_batch = training.micro_batch or training.batch
    figures = objectives.heldout_divergence(taught.heldout, heldout, vocab=vocab, micro_batch=micro_batch)
    if isinstance(taught.by, Correction):
        return taught.by.measuring(figures, objectives.heldout_loss(heldout, micro_batch=micro_batch))
    return figures


def _flops(training: Distill, teacher: Checkpoint, student: Checkpoint, *, variant: str) -> FlopsPerToken:
    if variant == "ce" or not objectives.teacher_terms(training):
        return by_context(learning, student.anatomy)
    return by_context(partial(distilling, training=training), student.anatomy, teacher.anatomy)


def _by_model(recipe: Recipe, training: Distill, teacher: Checkpoint, *, device: str) -> _Taught:
    half = loop.is_half(training, device)
    in_shards = teachers.stays(training) and training.shard_teacher and not here().alone
    model, live = teachers.load_teacher(
        teacher, training, dtype=recipe.dtype, device=device, half=half, in_shards=in_shards
    )
    return _Taught(live, live.head, live, model)


def _by_learner(recipe: Recipe, training: Distill, teacher: Checkpoint, *, device: str) -> _Taught:
    """The teacher before its correction."""
    model = teacher.load(dtype=recipe.dtype, device=here().home(device))
    own_dtype = model.dtype
    if not loop.is_half(training, device):
        model.float()
    live = Live(*split(model))
    return _Taught(live, live.head, live, model, own_dtype)


def _corrected(recipe: Recipe, training: Distill, taught: _Taught, course: Course, *, device: str) -> _Taught:
    """The same, with a correction by the section `correct`."""
    assert recipe.correct is not None
    assert taught.model is not None
    adapters.choose_trained(taught.model, recipe.correct, seed=recipe.seed)
    by = correction(taught.model, recipe.correct, training, course, device=device)
    return replace(taught, by=by, heldout=by)


def _save_teacher(recipe: Recipe, taught: _Taught, folder: Path, *, source: Path, record: Mapping[str, Any]) -> None:
    assert recipe.correct is not None
    assert taught.model is not None
    assert taught.dtype is not None
    kept = {key: record[key] for key in ("base_model", "teacher", "seed", "corpus")}
    own = {"stage": "correct", **kept, "training": recipe.correct.model_dump(mode="json")}
    adapters.merge(taught.model)
    shards.save(taught.model, folder, dtype=taught.dtype, extra_from=source, record=own)


def _by_cache(
    recipe: Recipe,
    training: Distill,
    folder: Path,
    teacher: str,
    text: Text,
    *,
    device: str,
) -> _Taught:
    """Open a cache that belongs to this teacher and this text, and has all of the course's samples."""
    store = Store.open(folder)
    vocab = store.bound.vocab  # of the teacher's head, which the fingerprint of the teacher covers
    store.require(
        answers.bound_to(
            recipe,
            training,
            teacher=teacher,
            tokenizer=text.tokenizer,
            course=text.course,
            heldout=text.heldout,
            vocab=vocab,
        )
    )
    if store.facts.drawn != answers.drawn(recipe, training):
        store.require_samples(answers.Needed.by(text.course).steps)
    head = store.head(device)
    return _Taught(store, head, CachedHidden(store, head, HELDOUT))


def _objective(
    training: Distill, taught: _Taught, student: PreTrainedModel, *, variant: str, vocab: int, seed: int
) -> tuple[objectives.Objective, nn.Module | None]:
    """The objective of this variant, and its own trained parameters."""
    terms, ce = objectives.teacher_terms(training), training.terms.get("ce", 0.0)
    if variant == "ce" or not terms:
        return objectives.cross_entropy(), None
    if isinstance(taught.by, Store):
        if training.cache == "logits":
            draws, kl = CachedDraws(taught.by), training.terms["kl"]
            temperature = training.temperature
            return objectives.distillation_from_draws(draws, vocab=vocab, kl=kl, temperature=temperature, ce=ce), None
        return objectives.distillation(CachedHidden(taught.by, taught.head), vocab=vocab, terms=terms, ce=ce), None
    logits = objectives.distillation(taught.by, vocab=vocab, terms=terms, ce=ce)
    states = training.intermediate
    if states is None:
        return logits, None
    assert taught.model is not None
    matching = intermediate.match(student, taught.model, states=states.states, layers=states.layers, seed=seed)
    return intermediate.with_states(logits, matching, alpha=states.alpha), matching.map


def _start(student: Checkpoint, variant: str, *, seed: int, dtype: Dtype, device: str) -> PreTrainedModel:
    """Load the student. For a random start, draw weights with its shapes and precision."""
    model = student.load(dtype=dtype, device=here().home(device))
    if variant != "random_init":
        return model
    with torch.random.fork_rng(
        devices=[]
    ):  # the draw depends only on the seed and does not affect other random numbers
        torch.manual_seed(seed)
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(student.config, dtype=torch.float32)
    return fresh.to(device=model.device, dtype=model.dtype)
