"""The distill stage: the student recovers what the cut cost it by following the teacher.

The variants share the tokens, their order and the loop, and differ in one thing each:

    student        the pruned model, trained with the recipe's objective
    ce             the pruned model, trained with cross-entropy alone
    random_init    the pruned model's sizes, weights drawn at random
    random_prune   a model whose kept parts were drawn at random (made by the prune stage)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from halve import checkpoint, measure
from halve.card import name_of
from halve.head import split
from halve.progress import SILENT, Progress
from halve.recipe import Distill, Dtype, Recipe
from halve.train import intermediate, loop, objectives, shards
from halve.train.course import open_course, open_heldout
from halve.train.documents import require_apart
from halve.train.teachers import Live

VARIANTS = ("student", "ce", "random_init", "random_prune")


def run(
    recipe: Recipe,
    *,
    teacher: Path | str,
    student: Path | str,
    variant: str,
    cache: Path,
    out: Path,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write the recovered student to `out/model` and the course of its training to `out/metrics.jsonl`.

    Before the first step: the teacher's cross-entropy is sane, its divergence from itself is zero, the
    vocabularies align, the student's figures are finite. The teacher only ever runs forward. The model keeps
    the precision of the student's checkpoint. `cache` is the run's folder of token files; what a killed run
    left in `out` is gone on with. Raises `TrainError` where one of these fails, and `CorpusError`.
    """
    assert recipe.distill is not None
    assert variant in VARIANTS
    training = recipe.distill
    device = checkpoint.resolve_device(recipe.device)
    tokenizer = checkpoint.load_tokenizer(teacher)
    for source in (teacher, student):
        config = checkpoint.load_config(source)
        checkpoint.check_tokenizer(tokenizer, config, source=source)
        measure.require_context(config, recipe.data.context, "a sample")
    course = open_course(recipe, training, cache=cache, tokenizer=tokenizer, progress=progress)
    heldout = open_heldout(recipe, training, cache=cache, tokenizer=tokenizer, progress=progress)
    micro_batch = training.micro_batch or training.batch

    precision = loop.autocast(training, device)
    master = checkpoint.load_model(teacher, dtype=recipe.dtype, device=device).requires_grad_(False)
    if not loop.is_half(training, device):
        master.float()  # products of half-precision weights would not be exact, and on a CPU not fast
    teacher_body, teacher_head = split(master)
    model = _start(student, variant, seed=recipe.seed, dtype=recipe.dtype, device=device)
    own_dtype = model.dtype
    if recipe.data.documents == "apart":
        for one in (master, model):
            require_apart(one)
    num_tokens = 1 + max(tokenizer.get_vocab().values())
    vocab = objectives.shared_vocab(split(model)[1], teacher_head, num_tokens=num_tokens)
    with precision:
        teacher_ce = objectives.check_teacher(teacher_body, teacher_head, heldout, vocab=vocab, micro_batch=micro_batch)
    live = Live(teacher_body, teacher_head)
    objective, extra = _objective(training, live, model, master, variant=variant, vocab=vocab, seed=recipe.seed)
    shards.frozen(master, teacher_body, training, half=loop.is_half(training, device))
    result = loop.train(
        model,
        objective,
        course,
        seed=recipe.seed,
        device=device,
        work=out / ".checkpoints",
        metrics=out / "metrics.jsonl",
        progress=progress,
        heldout=objectives.heldout_divergence(live, heldout, vocab=vocab, micro_batch=micro_batch),
        extra=extra,
        name="distill" if variant == "student" else f"distill-{variant}",
    )
    metrics = {"variant": variant, "teacher_ce": teacher_ce, **result.as_dict()}
    record = {
        "stage": "distill",
        "base_model": name_of(recipe.model),
        "teacher": checkpoint.fingerprint(teacher),
        "student": checkpoint.fingerprint(student),
        "seed": recipe.seed,
        "corpus": course.fingerprint,
        "training": training.model_dump(mode="json"),
        **metrics,
    }
    shards.save(model, out / "model", dtype=own_dtype, extra_from=student, record=record)
    return metrics


def _objective(
    training: Distill,
    teacher: Live,
    student: PreTrainedModel,
    master: PreTrainedModel,
    *,
    variant: str,
    vocab: int,
    seed: int,
) -> tuple[objectives.Objective, nn.Module | None]:
    """What this variant minimizes, and what it learns beside the student's weights."""
    terms = objectives.teacher_terms(training)
    if variant == "ce" or not terms:
        return objectives.cross_entropy(), None
    logits = objectives.distillation(teacher, vocab=vocab, terms=terms, ce=training.terms.get("ce", 0.0))
    states = training.intermediate
    if states is None:
        return logits, None
    matching = intermediate.match(student, master, states=states.states, layers=states.layers, seed=seed)
    return intermediate.with_states(logits, matching, alpha=states.alpha), matching.map


def _start(student: Path | str, variant: str, *, seed: int, dtype: Dtype, device: str) -> PreTrainedModel:
    """Load the student; for a random start, draw weights of its shapes in its precision."""
    model = checkpoint.load_model(student, dtype=dtype, device=device)
    if variant != "random_init":
        return model
    with torch.random.fork_rng(devices=[]):  # the draw is the seed's alone, and leaves no trace
        torch.manual_seed(seed)
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(checkpoint.load_config(student), dtype=torch.float32)
    return fresh.to(device=device, dtype=model.dtype)
