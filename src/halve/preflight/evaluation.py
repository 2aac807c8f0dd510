"""The work and the memory of the evaluate stage: every model of a run on held-out samples, items and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from halve.anatomy.work import Costed
from halve.cut.cost import Work, num_scored, reading
from halve.errors import HalveError
from halve.model.measure import CHUNK_ELEMENTS
from halve.preflight.asked import Asked
from halve.preflight.memory import Held
from halve.preflight.nests import planned_nest
from halve.preflight.rehearsal import forward_bytes
from halve.preflight.sizes import PlannedRound
from halve.recipe.rounds import learns_from_previous, rounds
from halve.recipe.schema import Recipe
from halve.stages.evaluate import FORWARD_TOKENS, NEW_TOKENS, REPEATS

_WARM_UP = 1
_MEMORY_STEPS = 4
"""Tokens that are generated once more to measure memory."""
_AT_ONCE = 6
"""Tensors of a chunk: the logits, both distributions, and what their divergence is summed from."""


def evaluated(recipe: Recipe, found: Sequence[PlannedRound]) -> list[Costed]:
    """Every model that is measured. The first is the reference of the others."""
    context = recipe.data.context
    teacher = Costed.of(found[0].before, context)
    models = [teacher] * (1 + recipe.corrects_before)
    for number, (part, shape) in enumerate(zip(rounds(recipe), found, strict=True), 1):
        student = Costed(shape.student, shape.after, context, shape.kept_layers)
        models += [student] * (1 if part.distill is None else 2 + len(part.distill.baselines))
        if part.corrects_beside:
            models.append(Costed.of(shape.before, context) if learns_from_previous(recipe, number) else teacher)
    if recipe.nest is not None:
        anatomy, sizes = planned_nest(recipe, found)
        models += [Costed(anatomy, arch, context) for arch in sizes[1:]]
    last = found[-1]
    return [*models, *[Costed(last.student, last.after, context, last.kept_layers)] * len(recipe.align)]


def evaluating(recipe: Recipe, found: Sequence[PlannedRound], asked: Asked) -> Work:
    """All that is measured. An upper bound: texts may have fewer samples, and completions may end early."""
    models, context, new = evaluated(recipe, found), recipe.data.context, recipe.evaluate.completion_tokens
    tokens = float(recipe.evaluate.samples * context)
    done = Work(tokens * len(models), tokens * (len(models) - 1) * models[0].whole)  # the reference beside each other
    for model in models:
        read, scored = sum(batch.ids.numel() for batch in asked.choices), sum(map(num_scored, asked.choices))
        done += Work(0, tokens * model.whole)
        done += Work(read, reading(model, asked.choices) + scored * model.head)
        done += sum((_completing(model, length, new) for length in asked.prompts), Work())
    if recipe.evaluate.speed:
        prompt, distinct = max(1, context - NEW_TOKENS), {model.arch: model for model in models}
        for model in distinct.values():
            timed = _completing(model, prompt, NEW_TOKENS)
            measured = _completing(model, prompt, _MEMORY_STEPS)
            times = REPEATS + _WARM_UP
            done += Work(times * timed.tokens, times * timed.flops) + measured
    return done


def evaluation_memory(recipe: Recipe, found: Sequence[PlannedRound], *, dtype: torch.dtype, on_cpu: bool) -> Held:
    """The reference beside the largest other model and a chunk of both distributions, or all models that are timed."""
    models = evaluated(recipe, found)
    sizes = {m.arch: dtype.itemsize * m.anatomy.ledger.count(m.arch, kept_layers=m.kept_layers).params for m in models}
    reference, *others = (sizes[model.arch] for model in models)
    held = [reference + max(others, default=0), sum(sizes.values()) if recipe.evaluate.speed else 0]
    context, vocab = recipe.data.context, models[0].arch.vocab
    samples = min(recipe.evaluate.samples, max(1, FORWARD_TOKENS // context))
    entries = min(samples * (context - 1), max(1, CHUNK_ELEMENTS // (2 * vocab))) * vocab
    passing, unknown = _AT_ONCE * torch.float32.itemsize * entries, ""
    try:
        body = forward_bytes(found[0].before.config, dtype, samples=samples, context=context)
        passing = max(passing, body)
    except HalveError:
        raise
    except Exception as error:  # a family's code may read contents, which do not exist
        unknown = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return Held(max(held), 0, 0, 0 if unknown else passing, on_cpu, unknown)


def _completing(model: Costed, prompt: int, new: int) -> Work:
    """A prompt and its greedy completion with the key-value cache. Logits are made for the last token only."""
    tokens = float(prompt + new)
    return Work(tokens, tokens * replace(model, context=prompt + new).body + (new + 1) * model.head)
