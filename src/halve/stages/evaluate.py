"""The evaluate stage: measure every model of a run on the same held-out samples.

Format of `results.json`. An estimate is {"value", "stderr"}. What was not measured is null or left out:

    reference     name of the model against which KL and agreement are measured
    samples       count, context, tokens, bytes, fingerprint of the held-out token file
    machine       device, threads
    speed_test    prompt_tokens, new_tokens, repeats, batch
    models        name -> params, non_embedding_params, weight_bytes, dtype, nll, perplexity, bits_per_byte,
                  kl, agreement, choices {file: estimate, items, acc, acc_norm}, speed {prefill_tokens_per_second,
                  decode_tokens_per_second, peak_memory_bytes}
    differences   subject, and against {name -> nll, kl, agreement, choices}: subject minus that model,
                  sample by sample (item by item), with the standard error of the pairs
    steps         model after a step of alignment -> before (the name of the model before the step), nll, kl, agreement,
                  choices: that model minus the one before, in the same way; left out if nothing was aligned
    completions   [{"prompt", "texts": {name: text}}], greedy
    answers       the same for chat prompts, given through the chat template; left out without a template
    tasks         tasks of lm-evaluation-harness (`evaluation.results.summary`); left out if the recipe names none.
                  `task-items.jsonl` then holds every item
    imported      [{"tool", "model", "value", "stderr", "version", "sha256"}] of other tools; left out if there are none

Figures of conversations are means over all counted tokens, those of packed text means over samples, which are equally
long.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halve.anatomy.configs import shortest_context
from halve.disk.files import write_json
from halve.evaluation.asking import read_exam
from halve.evaluation.imports import imported
from halve.evaluation.session import TaskSession
from halve.model import measure
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.choices import Answers, Encoded, answer_encoded
from halve.model.precision import stored_dtype
from halve.model.speed import Speed, compare_speed, weight_bytes
from halve.progress import SILENT, Progress
from halve.recipe.schema import Recipe
from halve.text import corpus
from halve.text.batch import Batch
from halve.text.conversation_samples import samples_of, say_cut
from halve.text.opened import require_embedded
from halve.text.questions import encoded_chat, encoded_choices, encoded_prompts
from halve.text.turns import answer_ends

FORWARD_TOKENS = 4096  # in one forward pass of the samples; results do not depend on it
NEW_TOKENS, REPEATS = 32, 5


@dataclass(frozen=True)
class _Measured:
    """The measurements of one model. Values per sample are kept for the paired differences."""

    facts: dict[str, Any]
    per_sample: dict[str, Tensor]
    choices: dict[str, Answers]
    texts: tuple[str, ...]
    """What it writes after each prompt, those of chats last."""
    shapes: tuple[object, ...]
    """The class of the model and its parameters' shapes. Models that share both run at the same speed."""


@dataclass(frozen=True)
class _Asked:
    """The items and prompts for every model, as tokens."""

    questions: Mapping[str, tuple[Encoded, ...]]
    prompts: Sequence[list[int]]
    chat: Mapping[str, list[int]]
    """Chat prompts by their text."""


def run(
    recipe: Recipe,
    *,
    models: Mapping[str, Checkpoint],
    reference: str,
    subject: str | None,
    chain: Sequence[str] = (),
    cache: Path,
    out: Path,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure every model and write `out/results.json`. Returns the main metrics of each model.

    `models` maps names to checkpoints, in the order of the report. KL and agreement are measured against `reference`.
    Differences are `subject` minus all others (None: none), and each model of `chain`, the student and then its aligned
    ones, minus the one before. `cache` has the run's token files. The tokenizer is that of the first model.

    Raises `CorpusError` for unusable held-out text, multiple-choice items or prompts, before any weight is loaded.
    """
    tokenizer = next(iter(models.values())).tokenizer
    asked = _asked(recipe, models, tokenizer)
    exam = read_exam(recipe.evaluate, context=shortest_context(model.config for model in models.values()))
    session = TaskSession(exam, tokenizer, out, recipe.seed, progress)
    require_embedded(recipe, next(iter(models.values())), "valid", cache=cache, progress=progress)
    tokens = corpus.open_split(recipe, "valid", cache=cache, tokenizer=tokenizer, progress=progress)
    samples = samples_of(tokens, recipe.data.context, recipe.seed)
    say_cut(progress, "data.valid", samples)
    heldout = samples.heldout(recipe.evaluate.samples)
    samples_BS = heldout.ids
    num_bytes = measure.target_bytes(tokenizer, samples_BS, heldout.predicted)
    device = resolve_device(recipe.device)

    def load(name: str) -> PreTrainedModel:
        return models[name].load_to_run(dtype=recipe.dtype, device=device)

    teacher = load(reference)
    measured: dict[str, _Measured] = {}
    with progress.task("evaluate", samples_BS.numel() * len(models)) as task:
        for name in models:
            model = teacher if name == reference else load(name)
            texts = _all_written(model, tokenizer, asked, recipe.evaluate.completion_tokens)
            against = None if name == reference else teacher
            stored = stored_dtype(recipe.dtype, models[name].config)
            measured[name] = _measure(model, against, heldout, num_bytes, asked.questions, texts, stored)
            session.ask(name, model, is_reference=name == reference)
            task.advance(samples_BS.numel(), perplexity=measured[name].facts["perplexity"]["value"])
            del model
    del teacher
    speeds = _speeds(measured, load, samples_BS) if recipe.evaluate.speed else {}
    facts = {
        "reference": reference,
        **_circumstances(heldout, num_bytes, tokens.fingerprint, device),
        "models": {name: {**measurement.facts, "speed": speeds.get(name)} for name, measurement in measured.items()},
        **_compared(measured, subject, chain, heldout.weights),
        **_written(measured, recipe, asked),
        **_solved(recipe, session, subject, chain),
    }
    write_json(out / "results.json", facts)
    return {name: _headline(measurement.facts) for name, measurement in measured.items()}


def _asked(recipe: Recipe, models: Mapping[str, Checkpoint], tokenizer: PreTrainedTokenizerBase) -> _Asked:
    """What every model is asked. Raises what the encoding of questions and prompts raises."""
    limit = shortest_context(model.config for model in models.values())
    vocab = next(iter(models.values())).config.get_text_config().vocab_size
    return _Asked(
        encoded_choices(recipe, tokenizer, limit),
        encoded_prompts(recipe, tokenizer, limit),
        encoded_chat(recipe, tokenizer, limit, num_tokens=vocab),
    )


def _solved(recipe: Recipe, session: TaskSession, subject: str | None, chain: Sequence[str]) -> dict[str, Any]:
    """The results of tasks and of other tools, if the recipe names any."""
    tasks = session.write(subject=subject, chain=chain)
    facts: dict[str, Any] = {} if tasks is None else {"tasks": tasks}
    if recipe.evaluate.imported:
        facts["imported"] = imported(recipe.evaluate.imported)
    return facts


def _circumstances(
    heldout: Batch, num_bytes: Int[Tensor, " samples"], fingerprint: str, device: str
) -> dict[str, dict[str, Any]]:
    """The samples, the machine and the settings of the measurements."""
    return {
        "samples": {
            "count": len(heldout.ids),
            "context": heldout.ids.shape[1],
            "tokens": heldout.labels().numel(),
            "bytes": int(num_bytes.sum()),
            "fingerprint": fingerprint,
        },
        "machine": {"device": _device_name(device), "threads": torch.get_num_threads()},
        "speed_test": {
            "batch": 1,
            "prompt_tokens": _speed_prompt(heldout.ids).shape[1],
            "new_tokens": NEW_TOKENS,
            "repeats": REPEATS,
        },
    }


def _measure(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    heldout: Batch,
    num_bytes: Int[Tensor, " samples"],
    questions: Mapping[str, Sequence[Encoded]],
    texts: tuple[str, ...],
    stored: torch.dtype,
) -> _Measured:
    samples_BS, which, weights_B = heldout.ids, heldout.predicted, heldout.weights
    micro_batch = max(1, FORWARD_TOKENS // samples_BS.shape[1])
    num_targets = samples_BS.shape[1] - 1 if which is None else which.sum(1)
    if teacher is None:
        per_sample = {"nll": measure.language_modeling(model, samples_BS, micro_batch=micro_batch, predicted=which)}
    else:
        divergence = measure.divergence(model, teacher, samples_BS, micro_batch=micro_batch, predicted=which)
        per_sample = {"nll": divergence.nll, "kl": divergence.kl, "agreement": divergence.agreement}
    choices = {name: answer_encoded(model, items) for name, items in questions.items()}
    nll = per_sample["nll"]
    facts: dict[str, Any] = {
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "non_embedding_params": _non_embedding(model),
        "weight_bytes": weight_bytes(model, stored),
        "dtype": str(model.dtype).removeprefix("torch."),
        "perplexity": measure.perplexity(nll, weights_B).as_dict(),
        "bits_per_byte": measure.bits_per_byte(nll, num_bytes, num_targets=num_targets).as_dict(),
        **{name: measure.average(values, weights_B).as_dict() for name, values in per_sample.items()},
        "choices": {name: _accuracies(answers) for name, answers in choices.items()},
    }
    shapes = (model.config.model_type, *((name, p.shape, p.dtype) for name, p in model.named_parameters()))
    return _Measured(facts, per_sample, choices, texts, shapes)


def _written(measured: Mapping[str, _Measured], recipe: Recipe, asked: _Asked) -> dict[str, list[dict[str, Any]]]:
    """What every model wrote after the prompts, and what it answered to those of chats."""
    texts = {"completions": _texts(measured, recipe.evaluate.prompts, first=0)}
    if asked.chat:
        texts["answers"] = _texts(measured, tuple(asked.chat), first=len(asked.prompts))
    return texts


def _texts(measured: Mapping[str, _Measured], prompts: Sequence[str], *, first: int) -> list[dict[str, Any]]:
    """What every model wrote after these prompts, the first of which is the one numbered `first`."""
    return [
        {"prompt": prompt, "texts": {name: measurement.texts[i] for name, measurement in measured.items()}}
        for i, prompt in enumerate(prompts, first)
    ]


def _accuracies(answers: Answers) -> dict[str, Any]:
    """Accuracies by halve's rule and by those of lm-evaluation-harness."""
    theirs = {"acc": answers.acc, "acc_norm": answers.acc_norm}
    return {
        **measure.proportion(answers.right).as_dict(),
        "items": len(answers.right),
        **{name: None if right is None else measure.proportion(right).as_dict() for name, right in theirs.items()},
    }


def _non_embedding(model: PreTrainedModel) -> int:
    """Parameters without the input, position and output embeddings. Tied ones count once."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        embeddings.add(head.weight)
    return sum(p.numel() for p in model.parameters() if not any(p is table for table in embeddings))


def _all_written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: _Asked, num_new_tokens: int
) -> tuple[str, ...]:
    """What a model writes after each prompt, those of chats last."""
    ends = measure.end_tokens(model, tokenizer), answer_ends(model, tokenizer)
    listed = (asked.prompts, asked.chat.values())
    return tuple(
        _complete(model, tokenizer, prompt, num_new_tokens, end)
        for prompts, end in zip(listed, ends, strict=True)
        for prompt in prompts
    )


@torch.no_grad()
def _complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    num_new_tokens: int,
    end: list[int] | None,
) -> str:
    """The model's greedy continuation of the prompt, up to a token `end`."""
    ids_1S = torch.tensor([ids], device=model.device)
    written = measure.generate_greedily(model, ids_1S, num_new_tokens=num_new_tokens, end=end)[0].tolist()
    # decoded as a whole, because a tokenizer may drop the space before the first decoded token
    return _decode(tokenizer, written)[len(_decode(tokenizer, ids)) :]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _speeds(
    measured: Mapping[str, _Measured], load: Callable[[str], PreTrainedModel], samples_BS: Tensor
) -> dict[str, dict[str, float]]:
    """Speed by name. Of models with the same shapes only one is timed."""
    same: dict[tuple[object, ...], list[str]] = {}
    for name, measurement in measured.items():
        same.setdefault(measurement.shapes, []).append(name)
    timed = {names[0]: load(names[0]) for names in same.values()}
    speeds = compare_speed(timed, _speed_prompt(samples_BS), num_new_tokens=NEW_TOKENS, repeats=REPEATS)
    return {name: _speed_facts(speeds[names[0]]) for names in same.values() for name in names}


def _speed_prompt(samples_BS: Tensor) -> Tensor:
    """One sample, shortened so that the new tokens still fit into the context."""
    return samples_BS[:1, : max(1, samples_BS.shape[1] - NEW_TOKENS)]


def _speed_facts(speed: Speed) -> dict[str, float]:
    return {
        "prefill_tokens_per_second": speed.prefill_tokens_per_second,
        "decode_tokens_per_second": speed.decode_tokens_per_second,
        "peak_memory_bytes": speed.peak_memory_bytes,
    }


def _compared(
    measured: Mapping[str, _Measured],
    subject: str | None,
    chain: Sequence[str],
    weights_B: Int[Tensor, " samples"] | None,
) -> dict[str, Any]:
    """The subject minus each other model, and each model of the chain minus the one before."""
    facts: dict[str, Any] = {"differences": None}
    if subject is not None:
        others = {name: theirs for name, theirs in measured.items() if name != subject}
        against = {name: _difference(measured[subject], theirs, weights_B) for name, theirs in others.items()}
        facts["differences"] = {"subject": subject, "against": against}
    if len(chain) > 1:
        facts["steps"] = {
            after: {"before": before, **_difference(measured[after], measured[before], weights_B)}
            for before, after in pairwise(chain)
        }
    return facts


def _difference(ours: _Measured, theirs: _Measured, weights_B: Int[Tensor, " samples"] | None) -> dict[str, Any]:
    """Ours minus theirs, paired by samples and items."""
    return {
        **{
            metric: measure.difference(values, theirs.per_sample[metric], weights_B).as_dict()
            for metric, values in ours.per_sample.items()
            if metric in theirs.per_sample
        },
        "choices": {
            task: measure.difference(answers.right.double(), theirs.choices[task].right.double()).as_dict()
            for task, answers in ours.choices.items()
        },
    }


def _headline(facts: Mapping[str, Any]) -> dict[str, Any]:
    names = ("params", "non_embedding_params", "perplexity", "bits_per_byte", "kl", "agreement", "choices")
    return {name: facts[name] for name in names if name in facts}


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores"
