"""Every shipped recipe parses, and the published ones have exactly the papers' shapes and hyperparameters.

Parameters of a llama or mistral layer without biases, by hand, with hidden D, ffn F, 32 heads and 8 groups of 128:

    q and o: 2 x D x 4096    k and v: 2 x D x 1024    gate, up, down: 3 x D x F    two norms: 2 x D

and outside the layers two embeddings of vocab x D and one norm of D.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halve.cli.app import main
from halve.recipe.read import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
}
MISTRAL_NEMO_12B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
}


NEMOTRON_4_15B = {
    "architectures": ["NemotronForCausalLM"],
    "model_type": "nemotron",
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 256000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def shipped() -> list[Path]:
    return sorted(RECIPES.glob("*.yaml"))


def minitrons() -> list[Path]:
    """The papers' models."""
    return [path for path in shipped() if "minitron" in path.stem]


def on_config(recipe: str, config: dict[str, Any], folder: Path) -> Path:
    """A copy of the recipe whose model is a folder with a config alone."""
    model = folder / "teacher"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    text = (RECIPES / recipe).read_text(encoding="utf-8")
    hub_name = load_recipe(RECIPES / recipe).model
    copy = folder / recipe
    copy.write_text(text.replace(f"model: {hub_name}", f"model: {model}"), encoding="utf-8")
    return copy


def dry_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["run", str(recipe), "--dry-run", "--card", "80", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_a_shipped_recipe_parses_and_is_named_like_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_the_published_models_are_shipped() -> None:
    names = {path.stem for path in minitrons()}
    assert names == {
        *("llama-3.1-minitron-4b-width", "llama-3.1-minitron-4b-depth", "mn-minitron-8b", "minitron-15b-8b-4b"),
    }


@pytest.mark.parametrize("path", minitrons(), ids=lambda path: path.stem)
def test_the_part_that_is_commented_out_is_a_recipe_too(path: Path, tmp_path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    start = lines.index("# correct:")
    lines[start:] = [line.removeprefix("# ") for line in lines[start:]]
    copy = tmp_path / path.name
    copy.write_text("\n".join(lines), encoding="utf-8")
    correct = load_recipe(copy).correct
    assert correct is not None
    assert (correct.tokens, correct.warmup_steps) == (100_000_000_000, 120)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [  # 2408.11796, Table 4
        ("llama-3.1-minitron-4b-width", (94_000_000_000, 1152, 1e-4, 1e-5, 40)),
        ("llama-3.1-minitron-4b-depth", (94_000_000_000, 1152, 1e-4, 1e-5, 40)),
        ("mn-minitron-8b", (380_000_000_000, 768, 1e-4, 4.5e-7, 60)),
    ],
)
def test_hyperparameters_are_those_of_table_4(name: str, schedule: tuple[float, ...]) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.distill is not None
    d = recipe.distill
    assert (d.tokens, d.batch, d.lr, d.min_lr, d.warmup_steps) == schedule
    assert d.objective == "kl"
    assert recipe.data.context == 8192
    assert (recipe.score.samples, recipe.score.batch_agg, recipe.score.seq_agg) == (1024, "l2", "mean")


@pytest.mark.parametrize("path", minitrons(), ids=lambda path: path.stem)
def test_the_papers_cut_is_plain(path: Path) -> None:
    """Entries are taken out and nothing is made up for: no other basis, no refit, no gains of norms, no merging."""
    recipe = load_recipe(path)
    for prune in (recipe.prune, *(step.prune for step in recipe.then)):
        assert (prune.rotation, prune.refit, prune.gain) == ("none", "none", "none")
        assert (prune.head_merge, prune.layer_merge, prune.steps) == (0, "none", 1)
        assert (prune.params, prune.non_embedding_ratio) == (None, None), "sizes by hand, so that nothing is tried"


def test_llama_width_has_the_papers_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = dry_run(on_config("llama-3.1-minitron-4b-width.yaml", LLAMA_3_1_8B, tmp_path), capsys)
    # a teacher's layer: 33,554,432 + 8,388,608 + 176,160,768 + 8,192
    assert found["teacher_counts"]["params"] == 32 * 218_112_000 + 4_096 + 2 * 128_256 * 4_096 == 8_030_261_248
    # a student's layer: 25,165,824 + 6,291,456 + 84,934,656 + 6,144
    non_embedding = 32 * 116_398_080 + 3_072
    assert found["student_counts"]["non_embedding"] == non_embedding == 3_724_741_632
    assert found["student_counts"]["params"] == non_embedding + 2 * 128_256 * 3_072 == 4_512_746_496
    shape = {"layers": 32, "hidden": 3072, "ffn": 9216, "heads": 32, "kv_heads": 8, "head_dim": 128, "vocab": 128256}
    assert found["student"] == shape
    assert rounded(found) == ("4.5B", "3.7B")


def test_llama_depth_has_the_papers_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = dry_run(on_config("llama-3.1-minitron-4b-depth.yaml", LLAMA_3_1_8B, tmp_path), capsys)
    non_embedding = 16 * 218_112_000 + 4_096
    assert found["student_counts"]["non_embedding"] == non_embedding == 3_489_796_096
    assert found["student_counts"]["params"] == non_embedding + 2 * 128_256 * 4_096 == 4_540_469_248
    assert found["dropped_layers"] == list(range(16, 32))
    assert (found["student"]["layers"], found["student"]["hidden"], found["student"]["ffn"]) == (16, 4096, 14336)
    assert rounded(found) == ("4.5B", "3.5B")


def test_nemo_has_the_papers_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = dry_run(on_config("mn-minitron-8b.yaml", MISTRAL_NEMO_12B, tmp_path), capsys)
    # a layer: 33,554,432 + 8,388,608 + 141,557,760 + 8,192
    non_embedding = 40 * 183_508_992 + 4_096
    assert found["student_counts"]["non_embedding"] == non_embedding == 7_340_363_776
    assert found["student_counts"]["params"] == non_embedding + 2 * 131_072 * 4_096 == 8_414_105_600
    assert rounded(found) == ("8.4B", "7.3B")


def test_two_rounds_have_the_papers_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nemotron's layer: an ffn without a gate, norms with biases."""
    recipe = on_config("minitron-15b-8b-4b.yaml", NEMOTRON_4_15B, tmp_path)
    found = dry_run(recipe, capsys)

    def params(hidden: int, ffn: int, heads: int) -> int:
        attention = 2 * hidden * heads * 128 + 2 * hidden * 8 * 128
        return 32 * (attention + 2 * hidden * ffn + 4 * hidden) + 2 * hidden + 2 * 256_000 * hidden

    eight, four = found["rounds"]
    sizes = ("hidden", "ffn", "layers", "heads", "kv_heads")
    assert [eight["student"][axis] for axis in sizes] == [4096, 16384, 32, 48, 8]
    assert [four["student"][axis] for axis in sizes] == [3072, 9216, 32, 24, 8]
    assert eight["counts"]["params"] == params(4096, 16384, 48)
    assert four["counts"]["params"] == params(3072, 9216, 24)
    assert [f"{one['counts']['params'] / 1e9:.2f}B" for one in (eight, four)] == ["8.27B", "4.19B"]
    assert found["student"] == four["student"]
    once, smaller, least = (
        one["flops_per_token"] for one in (found["teacher_counts"], eight["counts"], four["counts"])
    )
    assert list(found["tokens"]) == [
        *("score", "prune", "distill", "score-2", "prune-2", "distill-2", "evaluate"),
    ]
    head = 2 * 256_000 * 4096
    assert found["flops"]["score-2"] == 1024 * 4096 * (smaller - head) + 8 * 4096 * smaller, "boundaries are looked at"
    assert found["flops"]["prune-2"] == 8 * 4096 * (smaller + least), "perplexity alone: nothing is made up for"
    assert found["flops"]["distill-2"] == 94e9 * (once + 3 * least), "the original teaches"
    loaded = load_recipe(recipe)
    assert [step.teacher for step in loaded.then] == ["original"]
    assert main(["run", str(recipe), "--dry-run", "--card", "80"]) == 0
    page = capsys.readouterr().out
    assert "round 1" in page
    assert "round 2" in page


def test_the_dry_run_says_whether_one_gpu_holds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = on_config("llama-3.1-minitron-4b-width.yaml", LLAMA_3_1_8B, tmp_path)
    found = dry_run(recipe, capsys)
    memory = found["memory"]["distill"]
    # four float32 a parameter of the student and two bytes of the teacher are above 80e9
    assert memory["masters_bytes"] + memory["gradient_bytes"] + memory["moment_bytes"] == 16 * 4_512_746_496
    assert memory["teacher_bytes"] == 2 * 8_030_261_248
    assert memory["fits"] is found["fits"] is False
    assert any(one["memory"]["fits"] for one in found["settings"])
    assert main(["run", str(recipe), "--dry-run", "--card", "80"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "distillation with other settings" in page
    assert "fits │" in page
    assert "4,512,746,496 (4.51B)" in page
    assert "3,724,741,632" in page


def test_a_small_student_fits_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**LLAMA_3_1_8B, "num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128}
    recipe = on_config("llama-3.1-minitron-4b-width.yaml", config, tmp_path)
    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("hidden: 3072", "hidden: 512").replace("ffn: 9216", "ffn: 1024"),
        encoding="utf-8",
    )
    assert dry_run(recipe, capsys)["fits"] is True


def rounded(found: dict[str, Any]) -> tuple[str, str]:
    counts = found["student_counts"]
    return f"{counts['params'] / 1e9:.1f}B", f"{counts['non_embedding'] / 1e9:.1f}B"
