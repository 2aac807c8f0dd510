"""The scores file: all nine combinations come back, and what is damaged or foreign is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from halve.anatomy import discover
from halve.cut.score.importance import BATCH_AGGREGATORS, SEQ_AGGREGATORS, seq_statistics, sums_over_batch
from halve.cut.score.scores import Scores, Statistics, random_scores, samples_fingerprint
from halve.errors import CorpusError, RunError
from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Aggregator, Recipe
from halve.stages import score

NINE = list(itertools.product(BATCH_AGGREGATORS, SEQ_AGGREGATORS))


@pytest.fixture
def statistics() -> Statistics:
    """Two layers, six hidden channels at three points, four heads of two channels in two groups."""
    generator = torch.Generator().manual_seed(0)

    def sums(points: int, channels: int) -> torch.Tensor:
        acts = torch.randn(points, 4, 9, channels, generator=generator)
        return torch.stack([sums_over_batch(seq_statistics(act)) for act in acts], dim=2)

    return Statistics(
        sums={"hidden": sums(3, 6), "ffn": sums(2, 10), "heads": sums(2, 8)},
        point_layers={"hidden": (0, 0, 1), "ffn": (0, 1), "heads": (0, 1)},
        block_sums=torch.tensor([1.0, 2.0], dtype=torch.float64),
        num_samples=4,
        head_dim=2,
        kv_heads=2,
    )


def scored(statistics: Statistics, batch_agg: Aggregator = "l2", seq_agg: Aggregator = "mean") -> Scores:
    return statistics.scores(batch_agg=batch_agg, seq_agg=seq_agg, model="abc", samples="def")


@pytest.mark.parametrize(("batch_agg", "seq_agg"), NINE)
def test_every_combination_comes_from_one_file(
    statistics: Statistics, tmp_path: Path, batch_agg: Aggregator, seq_agg: Aggregator
) -> None:
    path = tmp_path / "scores.safetensors"
    scored(statistics).save(path)
    found = Scores.load(path, batch_agg=batch_agg, seq_agg=seq_agg)
    expected = scored(statistics, batch_agg, seq_agg)
    assert found.by_axis().keys() == expected.by_axis().keys() == {"hidden", "ffn", "heads", "kv_heads", "layers"}
    assert all(found.by_axis()[axis].equal(tensor) for axis, tensor in expected.by_axis().items())
    assert all(tensor.dtype == torch.float32 for tensor in found.by_axis().values())
    assert (found.model, found.samples, found.batch_agg, found.seq_agg) == ("abc", "def", batch_agg, seq_agg)
    assert found.layers.tolist() == [0.25, 0.5]


def test_combinations_differ(statistics: Statistics) -> None:
    seen = [scored(statistics, *combination).hidden for combination in NINE]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations([s for s in seen if s is not None], 2))


def test_a_file_keeps_its_own_combination(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scored(statistics, "mean", "var").save(path)
    found = Scores.load(path)
    assert (found.batch_agg, found.seq_agg) == ("mean", "var")
    assert found.ffn is not None
    assert found.ffn.equal(load_file(path)["ffn"])


def test_an_axis_that_was_not_scored_is_absent(statistics: Statistics, tmp_path: Path) -> None:
    only_ffn = Statistics(
        sums={"ffn": statistics.sums["ffn"]},
        point_layers={"ffn": (0, 1)},
        block_sums=statistics.block_sums,
        num_samples=4,
        head_dim=2,
        kv_heads=2,
    )
    scored(only_ffn).save(tmp_path / "scores.safetensors")
    found = Scores.load(tmp_path / "scores.safetensors")
    assert (found.hidden, found.heads, found.kv_heads) == (None, None, None)
    assert set(found.by_axis()) == {"ffn", "layers"}


def test_random_scores_are_a_function_of_the_seed(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    anatomy = discover(config)
    one, again, other = (random_scores(anatomy, seed) for seed in (1, 1, 2))
    assert {axis: tuple(t.shape) for axis, t in one.by_axis().items()} == {
        "hidden": (32,), "ffn": (3, 48), "heads": (3, 4), "kv_heads": (3, 2), "layers": (3,)
    }  # fmt: skip
    assert all(again.by_axis()[axis].equal(tensor) for axis, tensor in one.by_axis().items())
    assert not any(other.by_axis()[axis].equal(tensor) for axis, tensor in one.by_axis().items())
    one.save(tmp_path / "random.safetensors")
    found = Scores.load(tmp_path / "random.safetensors", batch_agg="l2", seq_agg="mean")
    assert found.hidden is not None
    assert one.hidden is not None
    assert found.hidden.equal(one.hidden)


def test_a_file_that_names_no_method_is_read_as_activation(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scored(statistics).save(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name in ("method", "ffn_point"):
        del about[name]
    del tensors["hidden.layers"]
    save_file(tensors, path, metadata={"about": json.dumps(about)})
    found = Scores.load(path)
    assert (found.method, found.statistics.ffn_point) == ("activation", "down_input")  # type: ignore[union-attr]
    assert found.hidden_layers is not None
    save_file(tensors, path, metadata={"about": json.dumps({**about, "method": "guessing"})})
    with pytest.raises(RunError, match="not a sound scores file"):
        Scores.load(path)


def test_the_parts_of_hidden_add_up(statistics: Statistics) -> None:
    found = scored(statistics)
    assert found.hidden_layers is not None
    assert tuple(found.hidden_layers.shape) == (2, 6)
    torch.testing.assert_close(found.hidden_layers.sum(0), found.hidden)
    assert found.network()["hidden"].mean(1).abs().max() < 1e-6


def test_scores_of_another_model_are_refused(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scored(statistics).save(path)
    assert Scores.load(path, model="abc").model == "abc"
    with pytest.raises(RunError, match="scores of another model") as error:
        Scores.load(path, model="xyz")
    assert "abc" in error.value.why
    assert "xyz" in error.value.why


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no scores at .*nothing"):
        Scores.load(tmp_path / "nothing.safetensors")


def test_a_damaged_file(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    scored(statistics).save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"no safetensors at all"):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match="is not a sound scores file"):
            Scores.load(path)


def test_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"layers": torch.ones(2)}, path)
    with pytest.raises(RunError, match="its format is None") as error:
        Scores.load(path)
    assert "halve score" in error.value.fix


@pytest.mark.parametrize("lost", ["layers", "statistics.ffn.layer"])
def test_a_file_that_lost_a_part(statistics: Statistics, tmp_path: Path, lost: str) -> None:
    from safetensors import safe_open

    path = tmp_path / "scores.safetensors"
    scored(statistics).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: t for name, t in load_file(path).items() if name != lost}, path, metadata=metadata)
    with pytest.raises(RunError, match=f"part is missing .*{lost}"):
        Scores.load(path)


def test_samples_fingerprint_sees_ids_and_shape() -> None:
    ids = torch.arange(12).view(3, 4)
    assert samples_fingerprint(ids) == samples_fingerprint(ids.clone())
    assert len({samples_fingerprint(x) for x in (ids, ids.view(4, 3), ids + 1)}) == 3


def test_the_stage_writes_scores(make_recipe: Callable[..., Recipe], tiny_llama: Path, tmp_path: Path) -> None:
    metrics = score.run(make_recipe(), teacher=Checkpoint.open(tiny_llama), cache=tmp_path / "data", out=tmp_path)
    found = Scores.load(tmp_path / "scores.safetensors", model=Checkpoint.open(tiny_llama).fingerprint)
    assert set(found.by_axis()) == {"hidden", "ffn", "heads", "kv_heads", "layers"}
    assert (metrics["samples"], metrics["samples_asked"], metrics["tokens"]) == (8, 8, 8 * 32)
    assert metrics["block_importance"] == found.layers.tolist()
    assert len(found.samples) == 64


def test_the_stage_uses_what_there_is(make_recipe: Callable[..., Recipe], tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The cat sees the dog. " * 30, encoding="utf-8")
    data = {"train": [str(tmp_path / "short.txt")], "valid": [str(tmp_path / "short.txt")], "context": 32}
    recipe = make_recipe(data=data, score={"samples": 1000})
    metrics = score.run(recipe, teacher=Checkpoint.open(tiny_llama), cache=tmp_path / "data", out=tmp_path)
    assert 0 < metrics["samples"] < metrics["samples_asked"] == 1000


def test_the_stage_refuses_a_corpus_without_a_sample(
    make_recipe: Callable[..., Recipe], tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "word.txt").write_text("cat", encoding="utf-8")
    data = {"train": [str(tmp_path / "word.txt")], "valid": [str(tmp_path / "word.txt")], "context": 32}
    with pytest.raises(CorpusError, match="fewer tokens than one sample"):
        score.run(make_recipe(data=data), teacher=Checkpoint.open(tiny_llama), cache=tmp_path / "data", out=tmp_path)
    assert not (tmp_path / "scores.safetensors").exists()
