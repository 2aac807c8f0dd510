"""The course: spans of steps, the rate, phases that go on where earlier ones stopped, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from halve.errors import RecipeError
from halve.model.checkpoint import Checkpoint
from halve.model.head import Body, Head
from halve.pipeline import run as pipeline
from halve.pipeline.keys import keys_of
from halve.recipe.schema import Phase, Recipe, Training
from halve.text import schedule
from halve.text.batch import Batch
from halve.text.corpus import Tokens
from halve.text.course import Course, open_course, open_heldout
from halve.train.loop import loop
from halve.train.objectives import logits as objectives
from halve.train.teachers.answers import Needed

MakeRecipe = Callable[..., Recipe]
BASE = {"tokens": 40 * 8 * 32, "batch": 8, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 4}


class Fake:
    """Samples of nothing: what matters is which are asked for."""

    def __init__(self, context: int) -> None:
        self.context = context

    def batch(self, step: int, batch: int) -> Batch:
        return Batch(torch.zeros(batch, self.context, dtype=torch.int64), self.numbers(step, batch))

    def numbers(self, step: int, batch: int) -> tuple[int, ...]:
        return tuple(range(step * batch, (step + 1) * batch))


def training(*phases: dict[str, Any], **changes: Any) -> Training:
    return Training(**{**BASE, "phases": phases, **changes})


def course(*phases: dict[str, Any], context: int = 32, **changes: Any) -> Course:
    asked = training(*phases, **changes)
    first, *later = (Fake(span.context) for span in schedule.spans(asked, context))
    return Course(asked, first, tuple(later))


# ---- steps, tokens and rates


def test_a_course_without_phases_is_one_span() -> None:
    plain = course(tokens=40 * 256 - 5)
    assert plain.steps == 40
    assert [plain.tokens(step) for step in (0, 1, 40)] == [0, 256, 40 * 256]
    assert plain.batch(3).numbers == tuple(range(16, 24))


def test_a_phase_begins_with_a_whole_step_and_changes_what_a_step_holds() -> None:
    phased = course({"from_tokens": 10 * 256 - 7, "context": 64}, {"from_tokens": 20 * 256, "context": 128})
    assert [(span.first, span.steps, span.context) for span in phased.spans] == [(1, 10, 32), (11, 5, 64), (16, 5, 128)]
    assert phased.steps == 20
    assert [phased.tokens(step) for step in (9, 10, 11, 15, 16, 20)] == [n * 256 for n in (9, 10, 12, 20, 24, 40)]
    assert [tuple(phased.batch(step).ids.shape) for step in (10, 11, 16)] == [(8, 32), (8, 64), (8, 128)]
    assert phased.batch(11).numbers == phased.batch(16).numbers == tuple(range(8)), "draws of a phase count from 0"


@given(
    st.lists(st.tuples(st.integers(1, 4000), st.integers(2, 50)), max_size=4, unique_by=lambda phase: phase[0]),
    st.integers(1, 9),
)
def test_spans_cover_every_step_and_reach_their_tokens(phases: list[tuple[int, int]], batch: int) -> None:
    phases = sorted(phases)
    asked = Training(
        tokens=4001, batch=batch, phases=tuple(Phase(from_tokens=n, context=context) for n, context in phases)
    )
    spans = schedule.spans(asked, 16)
    ends = [*(n for n, _ in phases), 4001]
    step, tokens = 1, 0
    for span, end in zip(spans, ends, strict=True):
        assert (span.first, span.tokens_before) == (step, tokens)
        step, tokens = step + span.steps, tokens + span.steps * batch * span.context
        assert tokens >= end
        assert span.steps == 0 or tokens - batch * span.context < end, "not a step more than it takes"


def test_what_a_phase_leaves_out_stays_as_it_was() -> None:
    mixture = {"code": 1.0}
    spans = schedule.spans(
        training(
            {"from_tokens": 256, "mixture": mixture},
            {"from_tokens": 512, "context": 64, "lr": 5e-4},
            {"from_tokens": 2048, "lr": 2e-4},
        ),
        32,
    )
    assert [(span.context, span.lr, span.weights) for span in spans] == [
        (32, 1e-3, None),
        (32, 1e-3, mixture),
        (64, 5e-4, mixture),
        (64, 2e-4, mixture),
    ]


def test_a_phase_scales_the_cosine() -> None:
    plain, phased = course(), course({"from_tokens": 20 * 256, "lr": 4e-4}, {"from_tokens": 30 * 256, "lr": 2e-3})
    for step in range(1, 41):
        peak = {0: 1e-3, 1: 4e-4, 2: 2e-3}[(step > 20) + (step > 30)]
        share = (plain.lr(step) - 1e-4) / (1e-3 - 1e-4) if step > 4 else plain.lr(step) / 1e-3
        low = 1e-4 if step > 4 else 0.0
        assert phased.lr(step) == pytest.approx(low + share * (peak - low))
    assert phased.lr(40) == pytest.approx(1e-4)


def test_a_phase_in_the_warm_up_changes_its_slope() -> None:
    assert [course({"from_tokens": 512, "lr": 4e-3}).lr(step) for step in (1, 2, 3, 4)] == [2.5e-4, 5e-4, 3e-3, 4e-3]


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"from_tokens": BASE["tokens"]}, "each before tokens is reached"),
        ({"from_tokens": 100, "lr": 1e-5}, "a phase's lr is below min_lr 0.0001"),
        ({"from_tokens": 100, "mixture": {}}, "at least 1 item"),
        ({"from_tokens": 100, "mixture": {"web": 0.0}}, "greater than 0"),
        ({"from_tokens": 100, "context": 0}, "greater than or equal to 2"),
    ],
)
def test_phases_that_make_no_sense_are_refused(phase: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training(phase)


# ---- from a recipe


@pytest.fixture
def mixed(make_recipe: MakeRecipe, corpus: Path) -> MakeRecipe:
    """`mixed(*phases, **data)`: two thirds of the training text, a third of the held-out text."""

    def make(*phases: dict[str, Any], **data: Any) -> Recipe:
        parts = {
            "train": {"sources": [str(corpus / "train.txt")], "weight": 2},
            "valid": {"sources": [str(corpus / "valid.txt")], "weight": 1},
        }
        return make_recipe(
            data={"train": parts, "valid": [str(corpus / "valid.txt")], "context": 32, **data},
            distill={**BASE, "phases": phases},
        )

    return make


@pytest.fixture
def opened(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[[Recipe], Course]:
    def make(recipe: Recipe) -> Course:
        assert recipe.distill is not None
        return open_course(recipe, recipe.distill, cache=tmp_path / "cache", tokenizer=tokenizer)

    return make


def drawn(found: Course, first: int = 1, last: int | None = None) -> list[int]:
    steps = range(first, (last or found.steps) + 1)
    return [number for step in steps for number in found.batch(step).numbers]


def test_a_recipe_without_parts_is_drawn_as_its_text(
    make_recipe: MakeRecipe, opened: Callable[[Recipe], Course], mixed: MakeRecipe
) -> None:
    plain = opened(make_recipe(distill=BASE))
    numbers = drawn(plain)
    assert len(set(numbers)) == len(numbers) == 320
    assert drawn(opened(mixed())) != numbers


def test_a_phase_of_the_same_context_goes_on_in_the_same_epochs(
    mixed: MakeRecipe, opened: Callable[[Recipe], Course]
) -> None:
    one, other = {"from_tokens": 6 * 256, "mixture": {"valid": 1}}, {"from_tokens": 25 * 256, "mixture": {"train": 1}}
    recipe = mixed(one, other)
    found = opened(recipe)
    large, small = (len(part) for part in found.samples.parts)  # type: ignore[attr-defined]
    first, second, third = drawn(found, 1, 6), drawn(found, 7, 25), drawn(found, 26)
    assert sum(number >= large for number in first) == 16
    assert {number >= large for number in second} == {True}
    assert {number >= large for number in third} == {False}
    from_small = [number for number in first + second if number >= large][:small]
    assert sorted(from_small) == list(range(large, large + small)), "all of a part before any of it again"
    assert len(from_small) == small, "more of it was drawn than there is"
    from_large = [number for number in first + third if number < large]
    assert len(from_large) < large
    assert len(set(from_large)) == len(from_large)


def test_samples_of_another_context_have_numbers_of_their_own(
    mixed: MakeRecipe, opened: Callable[[Recipe], Course]
) -> None:
    phases = {"from_tokens": 10 * 256, "context": 64}, {"from_tokens": 30 * 256, "context": 32}
    found = opened(mixed(*phases))
    texts: dict[int, list[int]] = {}
    for step in range(1, found.steps + 1):
        one = found.batch(step)
        for number, row in zip(one.numbers, one.ids.tolist(), strict=True):
            assert texts.setdefault(number, row) == row, "a number stands for the same tokens wherever it comes up"
    assert {len(row) for row in texts.values()} == {32, 64}
    short = drawn(found, 1, 10) + drawn(found, found.spans[2].first)
    large = len(found.samples.parts[0])  # type: ignore[attr-defined]
    assert sorted({n for n in short if n < large}) == sorted(n for n in short if n < large), "the third span goes on"


def test_what_a_course_needs_is_known_without_reading_a_token(
    mixed: MakeRecipe, make_recipe: MakeRecipe, opened: Callable[[Recipe], Course], monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = {"from_tokens": 10 * 256, "context": 64, "mixture": {"valid": 1}}, {"from_tokens": 20 * 256}
    courses = [opened(mixed(*phases)), opened(make_recipe(distill={**BASE, "tokens": 600 * 256}))]
    expected = []
    for found in courses:
        steps: dict[int, int] = {}
        lengths: dict[int, int] = {}
        for step in range(1, found.steps + 1):
            batch = found.batch(step)
            assert found.numbers(step) == batch.numbers
            for number in batch.numbers:
                steps.setdefault(number, step)
                lengths[number] = batch.ids.shape[1]
        expected.append(Needed(steps, sum(lengths.values())))

    def read(*_: object, **__: object) -> None:
        raise AssertionError("tokens were read")

    monkeypatch.setattr(Tokens, "rows", read)
    with pytest.raises(AssertionError, match="tokens were read"):
        courses[0].batch(1)
    assert [Needed.by(found) for found in courses] == expected
    assert len(expected[1].steps) < 600 * 8, "the second course reads its samples more than once"


def test_the_order_does_not_depend_on_ranks_workers_or_where_it_is_begun(
    mixed: MakeRecipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    phases = {"from_tokens": 10 * 256, "context": 64, "mixture": {"valid": 1, "train": 3}}, {"from_tokens": 20 * 256}
    orders = []
    for workers in (1, 2):
        recipe = mixed(*phases, workers=workers)
        assert recipe.distill is not None
        for ranks in (1, 2, 4):
            found = open_course(recipe, recipe.distill, cache=tmp_path / str(workers), tokenizer=tokenizer)
            steps = list(range(1, found.steps + 1))
            backwards = {step: list(found.batch(step).split(8 // ranks)) for step in reversed(steps)}
            orders.append([(n, row) for step in steps for p in backwards[step] for n, row in _rows(p)])
    assert all(order == orders[0] for order in orders)


def _rows(batch: Batch) -> list[tuple[int, list[int]]]:
    return list(zip(batch.numbers, batch.ids.tolist(), strict=True))


def test_the_fingerprint_is_of_what_numbers_stand_for(
    mixed: MakeRecipe, make_recipe: MakeRecipe, opened: Callable[[Recipe], Course]
) -> None:
    base = opened(mixed()).fingerprint
    assert opened(mixed({"from_tokens": 512, "mixture": {"train": 1}, "lr": 5e-4})).fingerprint == base
    others = [
        opened(mixed({"from_tokens": 512, "context": 64})).fingerprint,
        opened(mixed(context=16)).fingerprint,
        opened(mixed(documents="apart")).fingerprint,
        opened(make_recipe(distill=BASE)).fingerprint,
    ]
    assert len({base, *others}) == 5


def test_documents_apart_reach_batches_and_heldout_samples(
    mixed: MakeRecipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, corpus: Path
) -> None:
    rows = [{"text": text} for text in (corpus / "valid.txt").read_text(encoding="utf-8").split("\n\n")]
    lines = tmp_path / "valid.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    joined, apart = (mixed(documents=way, valid=[str(lines)]) for way in ("joined", "apart"))
    for recipe in (joined, apart):
        assert recipe.distill is not None
        held = open_heldout(recipe, recipe.distill, cache=tmp_path, tokenizer=tokenizer)
        batch = open_course(recipe, recipe.distill, cache=tmp_path, tokenizer=tokenizer).batch(1)
        if recipe is joined:
            assert held.positions is None
            assert batch.positions is None
        else:
            assert batch.positions is not None
            assert held.positions is not None
            after_end = (held.ids[:, :-1] == tokenizer.eos_token_id).nonzero().tolist()
            assert after_end
            assert all(held.positions[row, place + 1] == 0 for row, place in after_end)


# ---- what is refused before weights load


@pytest.mark.parametrize(
    ("phase", "what", "fix"),
    [
        ({"mixture": {"vaild": 1}}, "a phase of distill mixes vaild, which data.train does not have", "valid?"),
        (
            {"mixture": {"maths": 1}},
            "a phase of distill mixes maths, which data.train does not have",
            "add a part maths",
        ),
        ({"context": 129}, "a phase of distill has context 129, the model's has 128", "context to 128 or less"),
    ],
)
def test_phases_that_do_not_fit_are_refused_before_weights_load(
    mixed: MakeRecipe, phase: dict[str, Any], what: str, fix: str
) -> None:
    found = pipeline.check(mixed({"from_tokens": 512, **phase}))
    assert [(type(error), error.what) for error in found] == [(RecipeError, what)]
    assert fix in found[0].fix
    assert pipeline.check(mixed({"from_tokens": 512, "mixture": {"valid": 1}, "context": 128})) == ()


def test_phases_of_correction_and_of_later_rounds_are_checked_too(make_recipe: MakeRecipe) -> None:
    phases = [{"from_tokens": 512, "mixture": {"code": 1}}]
    last = {"prune": {"ffn": 32}, "distill": {**BASE, "phases": phases}}
    found = pipeline.check(make_recipe(correct={**BASE, "phases": phases}, distill=BASE, then=[last]))
    assert [error.what.partition(" mixes")[0] for error in found] == [
        "a phase of correct",
        "a phase of distill of round 2",
    ]
    assert "a list of sources without parts" in found[0].why


# ---- what makes a stage run again


def test_weights_and_documents_count_where_they_are_read(mixed: MakeRecipe, tmp_path: Path, corpus: Path) -> None:
    opened = Checkpoint.open(mixed().model)

    def keys(recipe: Recipe) -> dict[str, str]:
        return keys_of(recipe, opened, pipeline.stages(recipe), memo=tmp_path / "hashes.json")

    def heavier(recipe: Recipe) -> Recipe:
        assert isinstance(recipe.data.train, dict)
        parts = {k: v.model_copy(update={"weight": v.weight + (k == "train")}) for k, v in recipe.data.train.items()}
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": parts})})

    def changed(recipe: Recipe) -> set[str]:
        found = keys(recipe)
        return {name for name, key in keys(mixed()).items() if found[name] != key}

    students = {"distill", "evaluate", "report"}
    assert changed(mixed(workers=3)) == set()
    assert changed(mixed(documents="apart")) == students
    assert changed(mixed(boundary="none")) == students | {"score", "prune"}
    assert changed(mixed({"from_tokens": 512, "lr": 5e-4})) == students
    assert changed(heavier(mixed())) == students | {"score", "prune"}


# ---- a run that is killed in the middle of an epoch and across phases


class Killed(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=320, max_position_embeddings=64))
    return model


@pytest.mark.parametrize("killed_at", [3, 7, 9])
def test_a_run_resumes_across_phases_with_the_same_bits(
    mixed: MakeRecipe, opened: Callable[[Recipe], Course], tmp_path: Path, killed_at: int
) -> None:
    phases = {"from_tokens": 4 * 256, "mixture": {"valid": 1}, "lr": 5e-4}, {"from_tokens": 8 * 256, "context": 64}
    recipe = mixed(*phases, documents="apart")
    assert recipe.distill is not None
    short = recipe.distill.model_copy(update={"tokens": 12 * 256, "checkpoint_every": 2})
    found = opened(recipe.model_copy(update={"distill": short}))
    assert found.steps == 10
    whole, objective = objectives.cross_entropy(), objectives.cross_entropy()
    calls = iter(range(killed_at - 1))

    def killed(body: Body, head: Head, batch: Batch) -> Any:
        if next(calls, None) is None:
            raise Killed
        return objective(body, head, batch)

    def run(name: str, objective: objectives.Objective) -> tuple[list[float], list[torch.Tensor], int]:
        model, folder = tiny(), tmp_path / name
        folder.mkdir(exist_ok=True)
        metrics = folder / "metrics.jsonl"
        files = loop.TrainFiles(folder / "work", metrics, seed=0)
        result = loop.train(model, loop.Lesson(objective), found, files, device="cpu")
        losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
        return losses, [parameter.detach() for parameter in model.parameters()], result.resumed_from

    want_losses, want, _ = run("whole", whole)
    with pytest.raises(Killed):
        run("killed", killed)
    losses, have, resumed = run("killed", objective)
    assert resumed == killed_at - 1
    assert losses == want_losses
    assert all(math.isfinite(loss) for loss in losses)
    assert all(torch.equal(one, other) for one, other in zip(have, want, strict=True))
