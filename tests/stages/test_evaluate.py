"""The evaluate stage on tiny llamas: what it writes is what `measure` says, and bad input is refused early."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from talking import saying, with_turn_end
from task_rows import write_data
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from halve.errors import CorpusError
from halve.model import measure, saving
from halve.model.checkpoint import Checkpoint
from halve.progress import SILENT
from halve.recipe.schema import Recipe
from halve.stages import evaluate
from halve.text import corpus as corpora

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def student(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller random model with the teacher's tokenizer."""
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.update({"num_hidden_layers": 2, "intermediate_size": 40})
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("student") / "model"
    saving.save_model(LlamaForCausalLM(config), folder, extra_from=tiny_llama, record={})
    return folder


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("choices") / "nouns.jsonl"
    lines = [
        {"context": "The small", "choices": [f" {a}", f" {b}"], "answer": i % 2}
        for i, (a, b) in enumerate([("cat", "sees"), ("dog", "finds"), ("tree", "takes"), ("bird", "the")] * 3)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def evaluated(
    recipe: Recipe, models: dict[str, Path], reference: str, out: Path, chain: tuple[str, ...] = ()
) -> dict[str, Any]:
    out.mkdir()
    subject = "distilled" if "distilled" in models else None
    evaluate.run(
        recipe,
        models={name: Checkpoint.open(path) for name, path in models.items()},
        reference=reference,
        subject=subject,
        chain=chain,
        cache=out / "data",
        out=out,
        progress=SILENT,
    )
    results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return results


def test_the_table_is_what_measure_says(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, choices: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(
        evaluate={
            "samples": 6,
            "choices": [str(choices)],
            "prompts": ["The old king"],
            "completion_tokens": 5,
            "speed": True,
        }
    )
    models = {"teacher": tiny_llama, "pruned": student, "distilled": student}
    results = evaluated(recipe, models, "teacher", tmp_path / "out")

    teacher, cut = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny_llama, student))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokens = corpora.open_split(recipe, "valid", cache=tmp_path / "again", tokenizer=tokenizer)
    samples = corpora.Samples(tokens, 32, 0).first(6)
    found = measure.divergence(cut, teacher, samples, micro_batch=6)
    num_bytes = measure.target_bytes(tokenizer, samples)
    assert results["samples"]["count"] == 6
    assert results["samples"]["bytes"] == int(num_bytes.sum())
    pruned = results["models"]["pruned"]
    for name, want in {
        "kl": measure.average(found.kl),
        "agreement": measure.average(found.agreement),
        "perplexity": measure.perplexity(found.nll),
        "bits_per_byte": measure.bits_per_byte(found.nll, num_bytes, num_targets=31),
    }.items():
        assert pruned[name]["value"] == pytest.approx(want.value, rel=1e-5), name
        assert pruned[name]["stderr"] == pytest.approx(want.stderr, rel=1e-4), name
    assert "kl" not in results["models"]["teacher"]

    config = teacher.config
    assert results["models"]["teacher"]["params"] == sum(p.numel() for p in teacher.parameters())
    embedding = config.vocab_size * config.hidden_size  # tied: one table
    assert pruned["params"] - pruned["non_embedding_params"] == embedding
    assert pruned["choices"]["nouns"]["items"] == 12
    assert {"value", "stderr"} == set(pruned["choices"]["nouns"]["acc"]) == set(pruned["choices"]["nouns"]["acc_norm"])
    share = pruned["choices"]["nouns"]["value"]
    assert pruned["choices"]["nouns"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 12))

    against = results["differences"]["against"]
    assert list(against) == ["teacher", "pruned"]
    assert against["pruned"]["kl"] == {"value": 0, "stderr": 0}
    nll = measure.difference(found.nll, measure.language_modeling(teacher, samples, micro_batch=6))
    assert against["teacher"]["nll"]["value"] == pytest.approx(nll.value, rel=1e-4)
    assert against["teacher"]["nll"]["stderr"] == pytest.approx(nll.stderr, rel=1e-4)

    # the two with equal shapes are timed once
    speed = {name: facts["speed"] for name, facts in results["models"].items()}
    assert speed["pruned"] == speed["distilled"] != speed["teacher"]
    assert speed["teacher"]["peak_memory_bytes"] > results["models"]["teacher"]["weight_bytes"]
    assert results["speed_test"]["prompt_tokens"] + results["speed_test"]["new_tokens"] <= 128

    (completion,) = results["completions"]
    ids = tokenizer("The old king", return_tensors="pt")
    want_ids = cut.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    want_text = tokenizer.decode(want_ids, skip_special_tokens=True)
    assert completion["prompt"] + completion["texts"]["pruned"] == want_text


def test_each_step_of_an_alignment_is_compared_with_the_model_before_it(
    make_recipe: MakeRecipe, tiny_llama: Path, student: Path, choices: Path, tmp_path: Path
) -> None:
    """On the same samples and items, from the values of every item that the stage writes beside its results."""
    chain = ("distilled", "aligned-sft", "aligned-2-rpo")
    # a baseline stands between the student and the first step
    models = {"teacher": tiny_llama, "distilled": student, "ce": tiny_llama}
    for seed, name in enumerate(chain[1:], 2):
        torch.manual_seed(seed)
        models[name] = tmp_path / name
        config = LlamaConfig.from_pretrained(student)
        config.initializer_range = 0.4
        saving.save_model(LlamaForCausalLM(config), models[name], extra_from=tiny_llama, record={})
    data = {task: str(write_data(tmp_path, task, 6)) for task in ("truthfulqa_mc2", "ifeval")}
    asked = {"tasks": {"truthfulqa_mc2": 0, "ifeval": 0}, "data": data, "limit": 6, "max_new_tokens": 4}
    recipe = make_recipe(evaluate={"samples": 6, "speed": False, "choices": [str(choices)], **asked})
    results = evaluated(recipe, models, "teacher", tmp_path / "out", chain)
    lines = [json.loads(line) for line in (tmp_path / "out" / "task-items.jsonl").read_text().splitlines()]
    metrics = {"truthfulqa_mc2 (0)": "acc", "ifeval (0)": "average"}
    assert list(results["steps"]) == list(results["tasks"]["steps"]) == list(chain[1:])
    for before, after in pairwise(chain):
        step, (old, new) = results["steps"][after], (results["models"][name] for name in (before, after))
        assert step["before"] == before
        for name in ("nll", "kl", "agreement"):
            assert step[name]["value"] == pytest.approx(new[name]["value"] - old[name]["value"], abs=1e-9)
        right = new["choices"]["nouns"]["value"] - old["choices"]["nouns"]["value"]
        assert step["choices"]["nouns"]["value"] == pytest.approx(right)
        assert set(results["tasks"]["steps"][after]) == set(metrics)
        for key, metric in metrics.items():
            values = [line["values"] for line in lines if line["task"] == key]
            pairs = [value[after][metric] - value[before][metric] for value in values]
            difference = results["tasks"]["steps"][after][key]
            assert difference["value"] == pytest.approx(statistics.mean(pairs))
            assert difference["stderr"] == pytest.approx(statistics.stdev(pairs) / math.sqrt(6))
        assert results["tasks"]["steps"][after]["truthfulqa_mc2 (0)"]["stderr"] > 1e-4, "their answers are not the same"


def test_without_distillation_and_speed(make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path) -> None:
    results = evaluated(make_recipe(), {"teacher": tiny_llama}, "teacher", tmp_path / "out")
    assert results["differences"] is None
    assert "steps" not in results
    assert results["models"]["teacher"]["speed"] is None
    assert results["completions"] == []


def test_the_same_run_gives_the_same_bytes(make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        evaluated(make_recipe(), {"teacher": tiny_llama}, "teacher", tmp_path / name)
    assert (tmp_path / "a/results.json").read_bytes() == (tmp_path / "b/results.json").read_bytes()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"prompts": ["x " * 200]}, r"the prompt 'x x .*' of evaluate.prompts has \d+ tokens"),
        ({"prompts": [""]}, "the prompt '' of evaluate.prompts has no tokens"),
    ],
)
def test_prompts_that_do_not_fit(
    make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path, evaluation: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        evaluated(make_recipe(evaluate=evaluation), {"teacher": tiny_llama}, "teacher", tmp_path / "out")


def test_bad_choices_are_refused_before_weights_are_read(
    make_recipe: MakeRecipe, tiny_llama: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "load", no_weights)
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"context": "a cat " * 200, "choices": ["x", "y"], "answer": 0}), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"long\.jsonl line 1 has \d+ tokens, the model's context has 128"):
        evaluated(make_recipe(evaluate={"choices": [str(path)]}), {"teacher": tiny_llama}, "teacher", tmp_path / "a")
    twice = {"choices": [str(choices), str(choices)]}
    with pytest.raises(CorpusError, match="two multiple-choice files are called nouns"):
        evaluated(make_recipe(evaluate=twice), {"teacher": tiny_llama}, "teacher", tmp_path / "b")


def test_answers_to_chat_prompts_end_where_the_template_ends_a_turn(tiny_llama: Path) -> None:
    teacher = Checkpoint.open(tiny_llama)
    ended = with_turn_end(teacher.tokenizer)
    model = saying(teacher.load(), ended("It is 5.~\nu:7")["input_ids"])
    asked = evaluate._Asked({}, [[40, 41]], {"Who?": [42, 43]})
    plain, chat = evaluate._all_written(model, ended, asked, 20)
    assert chat == "It is 5."
    assert plain.startswith("It is 5.\nu:7")


@pytest.mark.parametrize(
    ("given", "found"), [(5, [5]), ([5, 6], [5, 6]), ("0", [0]), ([None, 7], [7]), (None, [0]), ({}, [0])]
)
def test_what_ends_a_text_are_tokens(tiny_llama: Path, given: Any, found: list[int]) -> None:
    teacher = Checkpoint.open(tiny_llama)
    model = teacher.load()
    model.generation_config.eos_token_id = given
    assert measure.end_tokens(model, teacher.tokenizer) == found
