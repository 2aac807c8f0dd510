"""What a correction trains, and that adapters end up in the weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from halve.errors import RecipeError
from halve.recipe.schema import Correct
from halve.text.batch import Batch
from halve.text.course import Course
from halve.train.loop import adapters, checkpoints, loop
from halve.train.loop.optimizers import make_optimizer
from halve.train.loop.step import Trained
from halve.train.objectives import logits as objectives

VOCAB, CONTEXT = 37, 12


def section(**changes: Any) -> Correct:
    values = {"tokens": 4 * 8 * CONTEXT, "batch": 8, "lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1}
    return Correct(**(values | changes))


def of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(families.config(family))
    return model.eval()


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=32)).eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None], use_cache=False).logits


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Text:
    """A token's successor is always the same."""

    context = CONTEXT

    def batch(self, step: int, batch: int) -> Batch:
        first_B1 = torch.randint(VOCAB, (batch, 1), generator=torch.Generator().manual_seed(step))
        return Batch((first_B1 + 5 * torch.arange(CONTEXT)) % VOCAB, self.numbers(step, batch))

    def numbers(self, step: int, batch: int) -> tuple[int, ...]:
        return tuple(range(step * batch, (step + 1) * batch))


class Killed(BaseException):
    pass


def train(folder: Path, model: PreTrainedModel, asked: Correct, *, kill_at: int | None = None) -> loop.TrainResult:
    cross_entropy, calls = objectives.cross_entropy(), iter(range(1, 100))

    def objective(*args: Any) -> Any:
        if next(calls) == kill_at:
            raise Killed
        return cross_entropy(*args)

    folder.mkdir(exist_ok=True)
    files = loop.TrainFiles(folder / "work", folder / "metrics.jsonl", seed=0)
    return loop.train(model, loop.Lesson(objective), Course(asked, Text()), files, device="cpu")


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "gpt2", "gpt_neox", "qwen3", "cohere2"])
def test_merged_adapters_give_the_logits_that_they_gave_apart(family: str) -> None:
    model = of(family)
    before, names = logits(model), list(state(model))
    adapters.add_lora(model, rank=3, alpha=6.0, seed=0)
    assert torch.equal(logits(model), before)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    apart = logits(model)
    assert (apart - before).abs().max() > 0.01
    adapters.merge(model)
    assert list(state(model)) == names
    torch.testing.assert_close(logits(model), apart, rtol=0, atol=1e-5)
    unchanged = state(model)
    adapters.merge(model)
    assert all(torch.equal(value, unchanged[name]) for name, value in state(model).items())


def test_adapters_lie_beside_every_matrix_of_the_body_and_nothing_else_trains() -> None:
    model = of("llama")
    adapters.add_lora(model, rank=4, alpha=8.0, seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    want = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[4] for name in trained} == want
    assert len(trained) == 6 * 2 * len(want)
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


def test_an_adapter_is_drawn_from_the_seed_and_leaves_no_trace_in_others_draws() -> None:
    found = []
    for seed in (0, 0, 1):
        model = of("llama")
        torch.manual_seed(7)
        adapters.add_lora(model, rank=2, alpha=2.0, seed=seed)
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(7))
        found.append(next(p.detach() for name, p in model.named_parameters() if "lora_A" in name))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", [*families.PROVED, *families.ALSO])
def test_norms_are_those_of_the_anatomy_and_no_matrix(family: str) -> None:
    from halve.anatomy import discover

    model = of(family)
    found, anatomy = adapters.norms(model), discover(model.config)
    known = [name for name in anatomy.norms if list(model.get_submodule(name).parameters())]
    assert set(known) <= set(found)
    assert not set(found) & set(anatomy.modules)
    if family == "olmo":
        with pytest.raises(RecipeError, match="method: norms finds nothing to train in a olmo"):
            adapters.choose_trained(model, section(method="norms"), seed=0)
        return
    adapters.choose_trained(model, section(method="norms"), seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.rpartition(".")[0] for name in trained} == set(found)
    per_layer = {"qwen3": 4, "gemma3_text": 6, "gemma2": 4, "llama": 2}
    if family in per_layer:
        assert len(found) == 1 + 6 * per_layer[family]


@pytest.mark.parametrize(("method", "share"), [("full", 1.0), ("lora", 0.5), ("norms", 0.05)])
def test_only_what_was_chosen_moves_has_moments_and_is_kept(tmp_path: Path, method: str, share: float) -> None:
    asked = section(method=method, lora_rank=2, checkpoint_every=2)
    model, start = tiny(), state(tiny())
    adapters.choose_trained(model, asked, seed=0)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = sum(value.numel() for value in start.values())
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0 < count <= share * whole
    assert (count == whole) == (method == "full")
    trained = Trained({"student": model}, make_optimizer(model.parameters(), asked))
    assert sum(p.numel() for group in trained.optimizer.param_groups for p in group["params"]) == count
    with pytest.raises(Killed):
        train(tmp_path, model, asked, kill_at=3)
    kept = checkpoints.complete(tmp_path / "work")[-1]
    with safe_open(next(kept.glob("*.safetensors")), framework="pt") as file:
        keys = set(file.keys())
        assert {key.removeprefix("param.student.") for key in keys if key.startswith("param.")} == names
        assert {key.removeprefix("exp_avg.student.") for key in keys if key.startswith("exp_avg.")} == names
    adapters.merge(model)
    moved = {name for name, value in state(model).items() if not torch.equal(value, start[name])}
    want = {"full": set(start), "norms": names, "lora": {f"{name}.weight" for name in adapters.linears(model)}}
    assert moved == want[method]


@pytest.mark.parametrize("method", ["lora", "norms"])
def test_a_kill_changes_nothing(tmp_path: Path, method: str) -> None:
    asked = section(method=method, lora_rank=2, checkpoint_every=2)

    def model() -> PreTrainedModel:
        made = tiny()
        adapters.choose_trained(made, asked, seed=0)
        return made

    whole, killed = model(), model()
    first = train(tmp_path / "whole", whole, asked)
    assert first.loss is not None
    with pytest.raises(Killed):
        train(tmp_path / "killed", killed, asked, kill_at=4)
    killed = model()
    assert train(tmp_path / "killed", killed, asked).resumed_from == 2
    for one in (whole, killed):
        adapters.merge(one)
    assert all(torch.equal(value, state(killed)[name]) for name, value in state(whole).items())


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError) as caught:
        adapters.choose_trained(tiny(), section(method="lora"), seed=0)
    assert caught.value.fix == "pip install 'halve[lora]', or method: full or norms"
    adapters.choose_trained(tiny(), section(method="full"), seed=0)
