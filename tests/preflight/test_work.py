"""The rows of the dry run's table of work against what stages really compute on a small model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from halve.anatomy.work import Costed
from halve.cut import apply, cost, trial
from halve.cut.cost import trying
from halve.cut.given import calibration_samples
from halve.cut.layers import chosen as removal
from halve.cut.proof.prove import prove
from halve.cut.repair import rotate
from halve.cut.trial import Tried
from halve.model.checkpoint import Checkpoint
from halve.preflight import cutting, evaluation
from halve.preflight.forecast import forecast
from halve.preflight.sizes import planned_rounds
from halve.preflight.work import trials
from halve.recipe.schema import Recipe
from halve.report.tables import forecast_tables
from halve.stages import evaluate, prune, score
from halve.text.mixture import Mixture

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A llama whose products outweigh what is done on two tokens here and there."""
    folder = tmp_path_factory.mktemp("work") / "teacher"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _half_of_the_square(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """PyTorch counts no attention on a CPU; causal attention needs half of what `sdpa_flop_count` counts."""
    return sdpa_flop_count(query, key, value) // 2


def _half_of_the_way_back(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value) // 2


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION = {
    _ATTENTION: _half_of_the_square,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _half_of_the_way_back,
}


class Counted:
    """FLOPs, and layers run by tokens, of the functions that stand for rows; what is within another is its own."""

    def __init__(self, layers: int) -> None:
        self.flops: dict[str, float] = {}
        self.tokens: dict[str, float] = {}
        self.layers = layers
        self.tried: tuple[Tried, ...] = ()
        self._run = 0.0

    def saw(self, states_BSD: Tensor) -> None:
        self._run += states_BSD.shape[0] * states_BSD.shape[1] / self.layers

    def row(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            run, others = self._run, sum(self.tokens.values())
            within = sum(self.flops.values())
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                result = function(*args, **kwargs)
            found = counter.get_total_flops() - (sum(self.flops.values()) - within)
            if name == "trial":
                self.tried = result
            self.flops[name] = self.flops.get(name, 0.0) + found
            own = self._run - run - (sum(self.tokens.values()) - others)
            self.tokens[name] = self.tokens.get(name, 0.0) + own
            return result

        return counting


@pytest.fixture
def counted(
    make_recipe: MakeRecipe, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Recipe, Counted]]:
    """Score and prune for real: `counted(score={...}, prune={...})`."""

    def count(**sections: Any) -> tuple[Recipe, Counted]:
        data = {**make_recipe().data.model_dump(), "context": 64}
        recipe = make_recipe(model=str(teacher), data=data, **sections)
        found, model = Counted(layers=6), Checkpoint.open(teacher)
        prove(model.anatomy)
        rotate.prove_rotation(model.anatomy)
        monkeypatch.setattr(rotate, "prove_rotation", lambda *_, **__: 0.0)
        run = LlamaDecoderLayer.forward

        def seen(layer: LlamaDecoderLayer, states_BSD: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.saw(states_BSD)
            return run(layer, states_BSD, *args, **kwargs)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", seen)
        monkeypatch.setattr(prune, "_check_reopens", lambda *_: None)
        monkeypatch.setattr(prune, "_check_cache", lambda *_: None)
        if "non_embedding_ratio" not in sections["prune"]:  # a trial refits, too
            monkeypatch.setattr(apply, "refit", found.row("refit", apply.refit))
            monkeypatch.setattr(apply, "score_by_refit", found.row("selection", apply.score_by_refit))
        monkeypatch.setattr(prune, "try_shapes", found.row("trial", trial.try_shapes))
        for stage in (score, prune):
            monkeypatch.setattr(stage, "choose_layers", found.row("layers", removal.choose_layers))
        out = tmp_path / "out"
        out.mkdir()
        found.row("score", score.run)(recipe, teacher=model, cache=tmp_path, out=out)
        found.row("prune", prune.run)(
            recipe, teacher=model, scores=out / "scores.safetensors", cache=tmp_path, out=tmp_path
        )
        if "evaluate" in sections:
            measured = {"teacher": model, "pruned": Checkpoint.open(tmp_path / "model")}
            how = {"models": measured, "reference": "teacher", "subject": None, "cache": tmp_path, "out": tmp_path}
            found.row("evaluate", evaluate.run)(recipe, **how)
        return recipe, found

    return count


@pytest.fixture
def items(tmp_path: Path) -> str:
    """Questions of several lengths."""
    asked = [
        {"context": "The old cat sees" + " the dog" * (n % 5), "choices": [" the small dog.", " old"], "answer": n % 2}
        for n in range(60)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("asked", "how"),
    [
        ({}, {"hidden": 36, "ffn": 96, "drop_layers": "3"}),  # with the last layer gone, the selection ends before it
        ({}, {"ffn": 80, "heads": 3, "refit": "outputs"}),
        ({}, {"hidden": 36, "ffn": 64, "steps": 3, "refit": "none"}),
        ({"method": "taylor"}, {"hidden": 36, "layers": 4, "rotation": "none", "refit": "none"}),
        ({"depth": "nll"}, {"hidden": 36, "untie": True, "layers": 4}),
        ({"depth": "logit_mse", "depth_pattern": "greedy"}, {"layers": 3, "refit": "none"}),
        ({"depth": "nll", "depth_pattern": "block"}, {"layers": 4, "refit": "none", "rotation": "none"}),
    ],
)
def test_rows_are_what_stages_compute(
    asked: dict[str, Any], how: dict[str, Any], counted: Callable[..., tuple[Recipe, Counted]]
) -> None:
    """Within 5 %: the few tokens that probe are not planned."""
    fixed = {"samples": 48, "micro_batch": 16, "depth_samples": 32}
    recipe, found = counted(score=fixed | asked, prune={"refit_samples": 48, **how})
    planned = forecast(recipe)
    rows = {name: flops for name, flops in found.flops.items() if flops}
    assert {name: flops for name, flops in planned.flops.items() if name != "evaluate"} == pytest.approx(rows, rel=0.05)
    for name in {"score", "layers"} & rows.keys():  # of the others a part goes through the student
        assert planned.tokens[name] == pytest.approx(found.tokens[name], rel=0.05)


@pytest.mark.parametrize("pattern", ["greedy", "block"])
def test_the_row_of_a_task(pattern: str, items: str, counted: Callable[..., tuple[Recipe, Counted]]) -> None:
    """Items are padded to their batch, and the head sees what is scored."""
    score = {"samples": 8, "micro_batch": 4, "depth": "task", "depth_task": items, "depth_pattern": pattern}
    recipe, found = counted(score=score, prune={"layers": 4, "refit": "none"})
    planned = forecast(recipe)
    assert not planned.unknown
    assert planned.flops["layers"] == pytest.approx(found.flops["layers"], rel=0.05)
    assert planned.tokens["layers"] == pytest.approx(found.tokens["layers"], rel=0.05)


def test_the_row_of_an_evaluation(
    items: str, counted: Callable[..., tuple[Recipe, Counted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two models: held-out samples, items, prompts, and the speed test, which is made short here."""
    for module in (evaluate, evaluation):
        monkeypatch.setattr(module, "NEW_TOKENS", 6)
        monkeypatch.setattr(module, "REPEATS", 1)
    asked = {"samples": 24, "choices": [items], "prompts": ["The old cat"] * 4, "completion_tokens": 6}
    score = {"samples": 8, "micro_batch": 4}
    recipe, found = counted(score=score, prune={"ffn": 96, "refit": "none"}, evaluate=asked)
    planned = forecast(recipe)
    assert not planned.unknown
    assert planned.flops["evaluate"] == pytest.approx(found.flops["evaluate"], rel=0.05)


def test_items_that_cannot_be_read_leave_their_row_out_and_say_so(
    make_recipe: MakeRecipe, items: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score = {"samples": 8, "micro_batch": 4, "depth": "task", "depth_task": items}
    recipe = make_recipe(score=score, evaluate={"samples": 4, "speed": False, "choices": [items]})
    whole = forecast(recipe)
    (tmp_path / "items.jsonl").write_text("no item\n", encoding="utf-8")
    planned = forecast(recipe)
    assert "layers" in whole.flops
    assert "layers" not in planned.flops
    assert 0 < planned.flops["evaluate"] < whole.flops["evaluate"]
    assert planned.unknown.keys() == {"layers", "evaluate"}
    forecast_tables(planned)
    page = " ".join(capsys.readouterr().out.split())
    assert "the work of layers is not counted in full: " in page
    assert "items.jsonl line 1 is not a multiple-choice item: it is not JSON" in page


def test_the_row_of_a_trial_counts_every_shape(counted: Callable[..., tuple[Recipe, Counted]]) -> None:
    sections = {"samples": 48, "micro_batch": 16}, {"non_embedding_ratio": 0.5, "refit_samples": 24}
    recipe, found = counted(score=sections[0], prune=sections[1])
    (listed,) = trials(recipe, planned_rounds(recipe, Checkpoint.open(recipe.model)))
    assert found.tried
    assert {one.arch for one in found.tried} <= {*listed}
    anatomy = Checkpoint.open(recipe.model).anatomy
    before = Costed(anatomy, anatomy.sizes, recipe.data.context)
    own = trying(before, anatomy, recipe.prune, recipe.score, [one.arch for one in found.tried], turned=True)
    assert own.flops == pytest.approx(found.flops["trial"], rel=0.05)
    assert forecast(recipe).flops["trial"] >= own.flops


@pytest.mark.parametrize("samples", [8, 400])
def test_a_trial_is_planned_with_the_samples_that_the_run_gives_it(
    samples: int, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(score={"samples": samples}, prune={"non_embedding_ratio": 0.5})
    sizes = Checkpoint.open(recipe.model).anatomy.sizes
    length = recipe.data.context
    monkeypatch.setattr(Mixture, "calibration", lambda _, number: torch.zeros(number, length, dtype=torch.long))
    given = calibration_samples(recipe, recipe.prune, sizes, Mixture((), ()))
    asked: list[int] = []
    whole = cost.trial_budget

    def noted(*args: Any, available: int, **about: Any) -> Any:
        asked.append(available)
        return whole(*args, available=available, **about)

    monkeypatch.setattr(cost, "trial_budget", noted)
    monkeypatch.setattr(cutting, "trial_budget", noted)
    forecast(recipe)
    assert {*asked} == {len(given)}
