"""Answers that the current model writes to the prompts of a step, and the pairs that rewards make of them.

A part of the answers is a file, written whole, and drawn from a seed of its own. So a killed run goes on with the next
part and gets the same answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from halve.align.examples import UNREAD, LeftOut
from halve.align.rewards import Reward
from halve.align.setting import StepSetting
from halve.disk.files import read_json, write_json
from halve.errors import TrainError
from halve.recipe.schema import Alignment
from halve.text.conversations import TOOLS
from halve.text.preferences import LARGEST_REWARD
from halve.text.rendering import encode_answers
from halve.text.turns import answer_ends

_PROMPTS = 8
"""Prompts of one part."""


def written_answers(
    rows: Sequence[Mapping[str, Any]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    how: StepSetting,
) -> list[list[str]]:
    """`step.answers` answers to the prompt of each row, drawn at `step.temperature`.

    Parts that are in the scratch folder are not written again. Each prompt is shorter than the context.
    """
    step, folder = how.step, how.scratch / "answers"
    assert step.answers is not None
    folder.mkdir(parents=True, exist_ok=True)
    answers: list[list[str]] = []
    with how.progress.task(f"answers for {how.name}", len(rows) * step.answers * step.answer_tokens) as task:
        for number, first in enumerate(range(0, len(rows), _PROMPTS)):
            part, path = rows[first : first + _PROMPTS], folder / f"part-{number:06d}.json"
            if not path.is_file():
                torch.manual_seed((how.seed << 20) + number)
                write_json(path, [_drawn(row, model, tokenizer, step, how.context) for row in part])
            answers += read_json(path)
            task.advance(len(part) * step.answers * step.answer_tokens)
    return answers


def judged(
    rows: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]], reward: Reward, *, left_out: LeftOut
) -> Iterator[dict[str, Any]]:
    """For each prompt the best and the worst of its answers, with their rewards. `left_out` counts prompts without.

    Raises `TrainError` for a reward that is not finite or too large for a loss.
    """
    for row, texts in zip(rows, answers, strict=True):
        rewards = all_rewarded(reward, row, texts)
        if rewards is None:
            left_out.add(UNREAD)
            continue
        best, worst = max(rewards), min(rewards)
        if best == worst:
            left_out.add("have answers of equal reward and are left out")
            continue
        chosen, rejected = (texts[rewards.index(value)] for value in (best, worst))
        yield {
            **{key: row[key] for key in ("prompt", TOOLS) if key in row},
            "chosen": {"role": "assistant", "content": chosen},
            "rejected": {"role": "assistant", "content": rejected},
            "rewards": [best, worst],
        }


def all_rewarded(reward: Reward, row: Mapping[str, Any], texts: Sequence[str]) -> list[float] | None:
    """The rewards of answers to the prompt of a row. None if one of them is too long to be judged.

    Raises `TrainError` for a reward that is not finite or too large for a loss.
    """
    rewards = []
    for text in texts:
        value = reward(row, text)
        if value is None:
            return None
        if not abs(value) <= LARGEST_REWARD:  # which nan is not
            raise TrainError(
                f"the reward of an answer is {value:g}",
                why=f"a reward is a number of at most {LARGEST_REWARD:.0e}; the answer is to"
                f" {json.dumps(row['prompt'])[:80]}",
                fix="use another reward model",
            )
        rewards.append(value)
    return rewards


@torch.no_grad()
def _drawn(
    row: Mapping[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, step: Alignment, context: int
) -> list[str]:
    """Answers from the model's own distribution; the checkpoint's settings of generation but its end are ignored."""
    prompt = prompt_ids_of(row, tokenizer)
    ids_1S = torch.tensor([prompt], device=model.device)
    end = answer_ends(model, tokenizer)
    checkpoint_config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        written_NS = model.generate(
            ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=step.temperature,
                top_k=0,
                num_return_sequences=step.answers,
                max_new_tokens=min(step.answer_tokens, context - len(prompt)),
                eos_token_id=end,
                pad_token_id=end[0] if end else None,
            ),
        )
    finally:
        model.generation_config = checkpoint_config
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written_NS[:, len(prompt) :]]


def prompt_ids_of(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a row's prompt, up to where the assistant is invited to answer."""
    return encode_answers(tokenizer, row["prompt"], (), tools=row.get(TOOLS), place="a prompt")[0]
