"""Conversations from a recipe to its report: every stage works on them, and its figures are those made by hand."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat import CHATML, small_talk, turns, write_rows
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from halve.errors import RecipeError
from halve.model.checkpoint import Checkpoint
from halve.model.head import split
from halve.pipeline import run as pipeline
from halve.pipeline.keys import fields, keys_of
from halve.pipeline.order import stages
from halve.preflight.check import check
from halve.progress import SILENT
from halve.recipe.schema import CHAT_PROMPTS, Recipe
from halve.stages import distill
from halve.text.batch import Batch
from halve.text.opened import open_text
from halve.train.objectives import logits as objectives
from halve.train.teachers.live import Live

MakeRecipe = Callable[..., Recipe]
TRAINING: dict[str, Any] = {"tokens": 4 * 4 * 128, "batch": 4, "lr": 3e-3, "eval_samples": 9, "checkpoint_every": 1}


@pytest.fixture
def talking(make_recipe: MakeRecipe, chat_model: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`talking({...of data}, **sections)`: a recipe on conversations."""

    def made(data: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        train = write_rows(tmp_path / "train.jsonl", *small_talk(60))
        valid = write_rows(tmp_path / "valid.jsonl", *small_talk(9, seed=1))
        text = {"train": [str(train)], "valid": [str(valid)], "messages_field": "messages", "context": 128}
        return make_recipe(data={**text, **(data or {})}, **{"model": str(chat_model), "distill": TRAINING, **sections})

    return made


def opened(recipe: Recipe, folder: Path) -> tuple[Any, Batch]:
    assert recipe.distill is not None
    text = open_text(recipe, recipe.distill, Checkpoint.open(recipe.model), cache=folder / "data", progress=SILENT)
    return text, text.course.batch(1)


def double(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    return model


@torch.no_grad()
def by_hand(
    student: PreTrainedModel, teacher: PreTrainedModel, talk: list[list[dict[str, str]]], tokenizer: Any, limit: int
) -> tuple[list[float], list[float], int, int]:
    """Nats and KL of the assistant's tokens of each conversation, read alone, how many these are, and their letters."""
    nats, divergences, count, size = [], [], 0, 0
    for messages in talk:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = made["input_ids"][:limit], [begin for begin, _ in made["offset_mapping"]][:limit]
        spans = []
        for number in range(1, len(messages), 2):
            before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            spans.append((len(before), len(tokenizer.apply_chat_template(messages[: number + 1], tokenize=False))))
        own = [i for i, at in enumerate(starts) if any(begin <= at < end for begin, end in spans)]
        logs = [model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for model in (student, teacher)]
        rows = [i - 1 for i in own]
        count += len(own)
        size += sum(end - begin for begin, end in (made["offset_mapping"][i] for i in own))
        nats.append(float(-sum(logs[0][i - 1, ids[i]] for i in own)))
        divergences.append(float((logs[1][rows].exp() * (logs[1][rows] - logs[0][rows])).sum()))
    return nats, divergences, count, size


# ---- losses


@torch.no_grad()
@pytest.mark.parametrize("documents", ["joined", "apart"])
def test_losses_are_those_of_the_assistants_tokens(
    talking: Callable[..., Recipe], chat_model: Path, tmp_path: Path, documents: str
) -> None:
    """In float64 beside a loop over conversations that are read alone."""
    recipe = talking({"documents": documents})
    text, _ = opened(recipe, tmp_path)
    teacher = double(chat_model)
    torch.manual_seed(1)
    student = double(chat_model)
    for parameter in student.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    (body, head), taught = split(student), Live(*split(teacher))
    nats, divergences, count, _ = by_hand(student, teacher, small_talk(9, seed=1), text.tokenizer, 128)
    ce, ce_count = objectives.cross_entropy()(body, head, text.heldout)
    kl, kl_count = objectives.distillation(taught, vocab=320)(body, head, text.heldout)
    assert ce_count == kl_count == count
    assert float(ce) == pytest.approx(sum(nats), rel=1e-6)
    assert float(kl) == pytest.approx(sum(divergences), rel=1e-5)
    figures = objectives.heldout_divergence(taught, text.heldout, vocab=320, micro_batch=2)(body, head)
    assert figures["ce"] == pytest.approx(sum(nats) / count, rel=1e-6)
    assert figures["kl"] == pytest.approx(sum(divergences) / count, rel=1e-5)


def test_a_steps_loss_is_over_its_counted_tokens_however_it_is_split(
    talking: Callable[..., Recipe], chat_model: Path, tmp_path: Path
) -> None:
    _, batch = opened(talking(), tmp_path)
    model = double(chat_model)
    body, head = split(model)

    def loss_and_gradient(micro_batch: int) -> tuple[float, Tensor]:
        model.zero_grad(set_to_none=True)
        total, count = 0.0, 0
        for part in batch.split(micro_batch):
            loss, num_tokens = objectives.cross_entropy()(body, head, part)
            loss.backward()
            total, count = total + float(loss.detach()), count + num_tokens
        grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return total / count, torch.cat(grads) / count

    want, want_gradient = loss_and_gradient(4)
    for micro_batch in (1, 3):
        loss, gradient = loss_and_gradient(micro_batch)
        assert loss == pytest.approx(want, rel=1e-6)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-7)


# ---- a run


def test_a_run_from_correction_to_report(talking: Callable[..., Recipe], chat_model: Path, tmp_path: Path) -> None:
    recipe = talking(
        correct=TRAINING,
        distill={**TRAINING, "cache": "hidden"},
        prune={"hidden": 24, "ffn": 40, "layers": 3},
        evaluate={"samples": 9, "speed": False, "completion_tokens": 5},
    )
    assert check(recipe) == ()
    run = tmp_path / "run"
    pipeline.run(recipe, run)
    for stage in ("correct", "prune", "distill"):
        assert (run / stage / "model" / "chat_template.jinja").read_bytes() == CHATML.encode()

    results = json.loads((run / "evaluate" / "results.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run / "distill" / "model")
    student, teacher = (AutoModelForCausalLM.from_pretrained(run / s / "model").eval() for s in ("distill", "correct"))
    learned, taught = student.double(), teacher.double()
    nats, divergences, count, size = by_hand(learned, taught, small_talk(9, seed=1), tokenizer, 128)
    found = results["models"]["distilled"]
    assert results["samples"]["tokens"] == count
    assert found["nll"]["value"] == pytest.approx(sum(nats) / count, rel=1e-4), "over tokens, not over conversations"
    assert found["kl"]["value"] == pytest.approx(sum(divergences) / count, rel=1e-3)
    paired = results["differences"]["against"]["pruned"]["nll"]["value"]
    assert paired == pytest.approx(found["nll"]["value"] - results["models"]["pruned"]["nll"]["value"], rel=1e-6)
    assert results["samples"]["bytes"] == size

    assert [answer["prompt"] for answer in results["answers"]] == list(CHAT_PROMPTS)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHAT_PROMPTS[1]}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    made = student.float().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert results["answers"][1]["texts"]["distilled"] == tokenizer.decode(made, skip_special_tokens=True)
    page = html.unescape((run / "report" / "report.html").read_text())
    shown = " ".join(page.partition("What they answer")[2].partition("</section>")[0].split())
    assert len(results["answers"]) == 3
    for answer in results["answers"]:
        for name, label in (("teacher", "Teacher"), ("distilled", "Distilled student")):
            text = answer["texts"][name].rstrip()
            block = f"{label}</p><pre><span>{answer['prompt']}\n\n</span>{text}</pre>"
            assert " ".join(block.split()) in shown, (name, answer["prompt"])


def test_a_killed_training_ends_with_the_same_bits(
    talking: Callable[..., Recipe], chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = talking({"documents": "apart"})

    def trained(out: Path) -> dict[str, Tensor]:
        out.mkdir(exist_ok=True)
        models = {"teacher": Checkpoint.open(chat_model), "student": Checkpoint.open(chat_model)}
        distill.run(recipe, **models, variant="student", cache=tmp_path / "data", out=out)
        return load_file(out / "model" / "model.safetensors")

    whole = trained(tmp_path / "whole")
    seen: list[int] = []
    labels = Batch.labels

    def killing(self: Batch) -> Tensor:
        seen.append(len(self))
        if len(seen) == 12:
            raise KeyboardInterrupt
        return labels(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "labels", killing)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed")
    assert list((tmp_path / "killed" / ".checkpoints").iterdir()), "it was killed on the way"
    resumed = trained(tmp_path / "killed")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_cached_answers_teach_the_same(talking: Callable[..., Recipe], chat_model: Path, tmp_path: Path) -> None:
    losses = []
    for cache in ("none", "hidden"):
        run = tmp_path / cache
        recipe = talking(distill={**TRAINING, "cache": cache})
        for stage in ("score", "prune", *["cache"] * (cache != "none"), "distill"):
            pipeline.run(recipe, run, only=stage)
        lines = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- keys and what is refused


def test_recipes_without_conversations_keep_their_keys(make_recipe: MakeRecipe, talking: Callable[..., Recipe]) -> None:
    added = {"messages_field", "count", "chat_prompts"}
    for stage in stages(make_recipe(correct=TRAINING, distill={**TRAINING, "cache": "hidden"})):
        read = fields(stage.recipe, stage.reads)
        assert not added & {key for section in read.values() if isinstance(section, dict) for key in section}
    for stage in stages(talking()):
        assert fields(stage.recipe, stage.reads)["data"]["messages_field"] == "messages"


def test_what_counts_makes_every_stage_again(talking: Callable[..., Recipe], tmp_path: Path) -> None:
    def keys(recipe: Recipe) -> dict[str, str]:
        return keys_of(recipe, Checkpoint.open(recipe.model), stages(recipe), memo=tmp_path / "memo")

    usual, other = keys(talking()), keys(talking({"count": "all"}))
    assert all(usual[name] != other[name] for name in usual)
    prompts = keys(talking(evaluate={"samples": 4, "speed": False, "chat_prompts": ["Who?"]}))
    assert {name for name in usual if usual[name] != prompts[name]} == {"evaluate", "report"}


@pytest.mark.parametrize("data", [{"count": "all"}, {"train": {"a": {"sources": ["a"], "weight": 1, "plain": True}}}])
def test_keys_of_conversations_want_conversations(make_recipe: MakeRecipe, data: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="set messages_field as well"):
        make_recipe(data={"train": ["a"], "valid": ["b"], **data})


def test_check_says_what_a_run_would(talking: Callable[..., Recipe], tiny_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare)
    (bare / "chat_template.jinja").unlink()
    assert [error.what for error in check(talking(model=str(bare)))] == ["the tokenizer has no chat template"]
    recipe = talking()
    bad = write_rows(tmp_path / "valid.jsonl", turns("Who?", "I."), turns("Who?", "I.")[::-1])
    assert [error.what for error in check(recipe)] == [f"{bad}, line 2: the conversation does not alternate"]
    recipe = talking()
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "Who?"}]}\n' * 9)
    assert [error.what for error in check(recipe)] == ["no conversation has a token to learn from"]
    recipe = talking(evaluate={"chat_prompts": ["Who? " * 90]})
    assert [error.what[:40] for error in check(recipe)] == ["the prompt 'Who? Who? Who? Who? Who? Who"]


def test_the_usual_chat_prompts_never_fail(make_recipe: MakeRecipe, tiny_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    (broken / "chat_template.jinja").write_text("{% for")
    recipe = make_recipe(model=str(broken))
    assert check(recipe) == ()
    asked = make_recipe(model=str(broken), evaluate={"chat_prompts": ["Who?"]})
    assert [error.what for error in check(asked)] == ["the chat template cannot be rendered for the prompt 'Who?'"]
