"""The align stage: one step of alignment, from the model of the step before to an aligned one.

    sft              cross-entropy on what the assistant says in conversations
    rpo, dpo, ipo    preference optimization on pairs of answers (`align.losses`)

The pairs come from the data, with the data's rewards or those of a verifier or a reward model. Or the current model
writes the answers itself, and the best and the worst become the pair.

What is held out is measured before and after. How far the model has moved from the teacher is measured by the evaluate
stage, for the model of every step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halve.align import measured, rewards, trainers, writing
from halve.align.examples import (
    UNREAD,
    Dialogue,
    LeftOut,
    Preference,
    dialogues,
    encoded_pair,
    largest_id,
    parted,
    preference_rows,
    require_examples,
)
from halve.align.setting import StepSetting
from halve.disk.files import atomic_file
from halve.model import measure, saving
from halve.model.card import name_of
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.precision import cast_weights
from halve.progress import SILENT, Progress
from halve.recipe.schema import Alignment, Recipe
from halve.text.turns import answer_ends
from halve.train.loop.loop import is_half

_Example = TypeVar("_Example", Dialogue, Preference)


def run(
    recipe: Recipe,
    step: Alignment,
    *,
    name: str,
    number: int,
    student: Checkpoint,
    out: Path,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write the aligned model to `out/model` and the log of the training to `out/metrics.jsonl`.

    `step` is the step with this `number`, from 1, and `student` the model that it starts from. The model keeps the
    precision of its weights. A killed run resumes from what it left in `out`: its answers and its last checkpoint.
    Raises `CorpusError` and `TokenizerError` for unusable data, `CheckpointError` for a reward model that is none,
    `TrainError` for a loss or a reward that is not finite, and `Stopped` after a SIGTERM.
    """
    device = resolve_device(recipe.device)
    context = step.context or recipe.data.context
    key = "data.context" if step.context is None else f"context in step {number} of align"
    measure.require_context(student.config, context, "a sample of align", key=key)
    half = is_half(step, device)
    how = StepSetting(step, name, out / ".checkpoints", context, recipe.seed + number, device, half, progress)
    model = student.load(dtype=recipe.dtype, device=device)
    own_dtype, ends = model.dtype, _new_ends(model, student.tokenizer)
    if step.kind == "sft":
        model, told, log = _on_dialogues(recipe, student, model, how)
    else:
        model, told, log = _on_pairs(student, model, how)
    _write_log(out / "metrics.jsonl", log)
    record = {
        "stage": "align",
        "base_model": name_of(recipe.model),
        "student": student.fingerprint,
        "seed": recipe.seed,
        "alignment": _shown(step),
        **told,
    }
    aligned = cast_weights(model, own_dtype)
    saving.save_model(aligned, out / "model", extra_from=student.files, record=record, ends=ends)
    return {"kind": step.kind, **told}


def _new_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where the aligned model's answers end, if its generation config does not say so yet; otherwise empty.

    Programs that open its folder read that file, and the chat template only for prompts.
    """
    ends = answer_ends(model, tokenizer)
    return [] if ends is None or ends == measure.end_tokens(model, tokenizer) else ends


def _on_dialogues(
    recipe: Recipe, student: Checkpoint, model: PreTrainedModel, how: StepSetting
) -> tuple[PreTrainedModel, dict[str, Any], list[dict[str, Any]]]:
    left_out = LeftOut()
    talks: list[Dialogue] = list(
        dialogues(how.step, recipe.data, student.tokenizer, context=how.context, left_out=left_out)
    )
    _require(talks, left_out, "conversation", student, how)
    train, heldout = _parted(talks, how)
    model = model.float()
    before = measured.dialogue_logps(model, heldout) if heldout else None
    done = trainers.train_on_dialogues(model, student.tokenizer, train, how)
    aligned = done.model.eval()
    told = _told(done.log, len(train))
    if before is not None:
        told |= measured.told_of_dialogues(heldout, before, measured.dialogue_logps(aligned, heldout))
    return aligned, told, done.log


def _on_pairs(
    student: Checkpoint, model: PreTrainedModel, how: StepSetting
) -> tuple[PreTrainedModel, dict[str, Any], list[dict[str, Any]]]:
    left_out = LeftOut()
    rewarded = _rewarded_rows(model, student.tokenizer, how, left_out)
    encoded = (
        encoded_pair(row, place, student.tokenizer, context=how.context, left_out=left_out) for row, place in rewarded
    )
    pairs: list[Preference] = [pair for pair in encoded if pair is not None]
    _require(pairs, left_out, "pair", student, how)
    train, heldout = _parted(pairs, how)
    model = model.float()
    before = measured.pair_logps(model, heldout) if heldout else None
    done = trainers.train_on_pairs(model, student.tokenizer, train, how)
    aligned = done.model.eval()
    told = _told(done.log, len(train))
    if before is not None:
        after = measured.pair_logps(aligned, heldout)
        told |= measured.told_of_pairs(heldout, before, after, beta=how.step.beta)
    return aligned, told, done.log


def _rewarded_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: StepSetting, left_out: LeftOut
) -> list[tuple[dict[str, Any], str]]:
    """Rows with two answers and, if the step needs them, rewards."""
    listed = list(preference_rows(how.step))
    if how.step.rewards == "data":
        return listed
    reward = rewards.open_reward(how.step, device=how.device)
    if how.step.answers is None:
        return [*_judged(listed, reward, left_out)]
    asked = [row for row, _ in listed if len(writing.prompt_ids_of(row, tokenizer)) < how.context]
    left_out.add(f"have a prompt of over {how.context} tokens and are left out", len(listed) - len(asked))
    answers = writing.written_answers(asked, model, tokenizer, how)
    return [(row, "an answer") for row in writing.judged(asked, answers, reward, left_out=left_out)]


def _judged(
    listed: Sequence[tuple[dict[str, Any], str]], reward: rewards.Reward, left_out: LeftOut
) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows with rewards of their own answers."""
    for row, place in listed:
        both = writing.all_rewarded(reward, row, [row[name]["content"] for name in ("chosen", "rejected")])
        if both is None:
            left_out.add(UNREAD)
        else:
            yield {**row, "rewards": both}, place


def _require(
    examples: Sequence[Dialogue | Preference], left_out: LeftOut, what: str, student: Checkpoint, how: StepSetting
) -> None:
    """Say what was left out, and refuse what cannot be trained on."""
    if left_out.told:
        how.progress.say(f"{how.name}: {left_out.told}")
    require_examples(len(examples), left_out, what)
    student.require_embedded(largest_id(examples), f"the data of {how.name}")


def _parted(examples: Sequence[_Example], how: StepSetting) -> tuple[list[_Example], list[_Example]]:
    """Examples to train on and held-out ones. Says how many are neither."""
    train, heldout, beside = parted(examples, how.step.heldout, seed=how.seed)
    if beside:
        alike = "equal a held-out conversation" if how.step.kind == "sft" else "have the prompt of a held-out pair"
        how.progress.say(f"{how.name}: {len(beside):,} {alike} and are left out")
    return train, heldout


def _told(log: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """What the manifest and the page say of the training."""
    return {
        "examples": count,
        "steps": int(log[-1]["step"]),
        "tokens": int(log[-1]["tokens"]),
        "loss_first": log[0]["loss"],
        "loss": log[-1]["loss"],
    }


def _shown(step: Alignment) -> dict[str, Any]:
    """The step without the places of its data, which may be private."""
    return {**step.model_dump(mode="json"), "data": [Path(source).name for source in step.data]} | (
        {"reward_model": name_of(step.reward_model)} if step.reward_model else {}
    )


def _write_log(path: Path, log: Sequence[Mapping[str, Any]]) -> None:
    with atomic_file(path) as draft:
        draft.write_text("".join(f"{json.dumps(line)}\n" for line in log), encoding="utf-8")
