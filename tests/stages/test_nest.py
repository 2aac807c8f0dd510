"""Students inside the student, with the real stages: sorted, trained together, killed and resumed, and saved."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from halve.cut.plan.nest import prefix_plan
from halve.cut.surgery.trim import trim
from halve.model.checkpoint import Checkpoint
from halve.model.head import split
from halve.pipeline import run as pipeline
from halve.pipeline.export import export
from halve.recipe.schema import Recipe
from halve.stages import distill
from halve.stages.smaller import open_nest
from halve.train.loop import checkpoints
from halve.train.nested import Once, students_of_step

MakeRecipe = Callable[..., Recipe]
DISTILL = {"tokens": 6 * 8 * 32, "batch": 8, "micro_batch": 4, "lr": 3e-3, "min_lr": 1e-3, "warmup_steps": 1}
SIZES = [{"ffn": 32, "hidden": 24}, {"ffn": 16, "layers": 2, "kv_heads": 1, "heads": 2}]
NESTED = {"distill": {**DISTILL, "eval_samples": 4, "checkpoint_every": 2}, "nest": {"sizes": SIZES}}


@pytest.fixture(scope="module")
def run(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(make_recipe(**NESTED), tmp_path_factory.mktemp("nested") / "run")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_every_size_leaves_as_an_ordinary_model(run: Path, tmp_path: Path) -> None:
    folders = [run / "distill" / "model", *(run / "distill" / f"nested-{n}" / "model" for n in (2, 3))]
    configs = [AutoModelForCausalLM.from_pretrained(folder).config for folder in folders]
    assert [(c.hidden_size, c.intermediate_size, c.num_hidden_layers) for c in configs] == [
        (32, 40, 3),
        (24, 32, 3),
        (24, 16, 2),
    ]
    assert [c.num_key_value_heads for c in configs] == [2, 2, 1]
    written = export(run, tmp_path / "small", student="nested-3")
    assert load_file(written / "model.safetensors").keys() == weights(run / "distill" / "nested-3").keys()


def test_smaller_students_are_the_first_parts_of_the_trained_one(run: Path) -> None:
    large, middle = weights(run / "distill"), weights(run / "distill" / "nested-2")
    assert torch.equal(middle["model.embed_tokens.weight"], large["model.embed_tokens.weight"][:, :24])
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(middle[down], large[down][:24, :32])
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.allclose(middle[norm], large[norm][:24], atol=1e-4), "norms are each student's own"


def test_the_report_compares_all_sizes(run: Path) -> None:
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert list(results["models"]) == ["teacher", "pruned", "distilled", "nested-2", "nested-3"]
    params = [results["models"][name]["params"] for name in ("distilled", "nested-2", "nested-3")]
    assert params == sorted(params, reverse=True)
    assert params == json.loads((run / "nest" / "manifest.json").read_text())["metrics"]["params"]
    assert results["differences"]["subject"] == "distilled"


def test_all_sizes_learn(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0]["heldout"], lines[-1]["heldout"]
    assert {"kl", "kl-2", "kl-3"} <= first.keys()
    assert last["kl-2"] < first["kl-2"]
    assert last["kl-3"] < first["kl-3"]


def test_a_student_inside_is_the_physical_cut_before_it_is_trained(run: Path) -> None:
    student = Checkpoint.open(run / "nest" / "model")
    model, anatomy = student.load(), student.anatomy
    nest = open_nest(model, anatomy, run / "nest" / "nest.json")
    entries = json.loads((run / "nest" / "nest.json").read_text())["sizes"]
    ids = torch.arange(40).view(2, 20)
    for number, entry in enumerate(entries, 1):
        after = anatomy.sizes.at(**{k: v for k, v in entry["arch"].items() if k in SIZES[1]})
        after = after.at(**{axis: entry["arch"][axis] for axis in ("hidden", "layers", "heads", "kv_heads", "ffn")})
        cut = trim(model, prefix_plan(anatomy, after, layers=entry["layers"]), anatomy, gains=entry["gains"])
        assert entry["gains"], "hidden is cut, and norms have fitted gains"
        body, head = nest.student(number, *split(model))
        with torch.no_grad():
            assert torch.equal(head.logits(body(ids)), cut(ids, use_cache=False).logits.float())


def distilled(recipe: Recipe, run: Path, out: Path) -> dict[str, Tensor]:
    out.mkdir(parents=True, exist_ok=True)
    teacher, student = Checkpoint.open(recipe.model), Checkpoint.open(run / "nest" / "model")
    distill.run(recipe, teacher=teacher, student=student, variant="student", cache=out.parent / "data", out=out)
    folders = {"": out, **{n: out / n for n in ("nested-2", "nested-3")}}
    return {f"{name}/{key}": value for name, at in folders.items() for key, value in weights(at).items()}


def test_a_killed_training_ends_with_the_same_bits(
    run: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(**NESTED)
    whole = {
        f"{name}/{key}": value
        for name in ("", "nested-2", "nested-3")
        for key, value in weights(run / "distill" / name).items()
    }

    class Killed(BaseException):
        pass

    saved, save = [], checkpoints.save

    def once(*args: Any, **options: Any) -> Any:
        if saved:
            raise Killed
        saved.append(1)
        return save(*args, **options)

    monkeypatch.setattr(checkpoints, "save", once)
    with pytest.raises(Killed):
        distilled(recipe, run, tmp_path / "out")
    monkeypatch.setattr(checkpoints, "save", save)
    again = distilled(recipe, run, tmp_path / "out")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_all_students_of_a_step_learn_from_one_pass_of_the_teacher(
    run: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(**{**NESTED, "nest": {"sizes": SIZES, "draws": 3}})
    monkeypatch.setattr(distill, "Once", CountedOnce)
    CountedOnce.asked = CountedOnce.passes = 0
    distilled(recipe, run, tmp_path / "out")
    assert CountedOnce.asked == 3 * 6 * 2, "three students, six steps of two micro-batches"
    assert CountedOnce.passes == 6 * 2


class CountedOnce(Once[Any]):
    asked = passes = 0

    def answer(self, batch: Any) -> Any:
        before = self.last
        answer = super().answer(batch)
        CountedOnce.asked += 1
        CountedOnce.passes += self.last is not before
        return answer


# ---- draws


def test_the_same_seed_draws_the_same_students() -> None:
    first = [students_of_step(0, step, students=3, draws=1) for step in range(1, 31)]
    assert first == [students_of_step(0, step, students=3, draws=1) for step in range(1, 31)]
    assert first != [students_of_step(1, step, students=3, draws=1) for step in range(1, 31)]
    assert Counter(number for numbers in first for number in numbers) == {0: 10, 1: 10, 2: 10}


@pytest.mark.parametrize("draws", [1, 2, 3, 4])
def test_every_student_is_drawn_equally_often_and_once_a_step(draws: int) -> None:
    steps = [students_of_step(7, step, students=4, draws=draws) for step in range(1, 13)]
    assert all(len(set(numbers)) == draws for numbers in steps)
    assert set(Counter(number for numbers in steps for number in numbers).values()) == {3 * draws}


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"distill": None}, "nest cannot be combined with a recipe without distill"),
        ({"distill": {**DISTILL, "baselines": ["ce"]}}, "nest cannot be combined with distill.baselines"),
        ({"distill": {**DISTILL, "compile": True}}, "nest cannot be combined with distill.compile"),
        (
            {"distill": {**DISTILL, "activation_checkpointing": "full"}},
            "nest cannot be combined with distill.activation_checkpointing",
        ),
        ({"then": [{"prune": {"ffn": 24}}]}, "nest cannot be combined with then"),
        ({"prune": {"non_embedding_ratio": 0.7}}, "nest cannot be combined with a trial"),
        ({"prune": {}, "search": {"budget": {"total": {"max": "60%"}}}}, "nest cannot be combined with search"),
        ({"nest": {"sizes": [{"ffn": 48}]}}, "student 2 of nest.sizes has ffn 48"),
    ],
)
def test_check_refuses(make_recipe: MakeRecipe, changes: dict[str, Any], what: str) -> None:
    (error,) = pipeline.check(make_recipe(**{**NESTED, **changes}))
    assert error.what == what
    assert error.why
    assert error.fix


def test_check_takes_what_nests(make_recipe: MakeRecipe) -> None:
    assert pipeline.check(make_recipe(**NESTED)) == ()


def test_a_draw_of_too_many_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(Exception, match="draws 4 of 3 students"):
        make_recipe(**{**NESTED, "nest": {"sizes": SIZES, "draws": 4}})
