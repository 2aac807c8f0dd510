"""What a family costs: the papers' claims from their published inputs, the sums, and the verb."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from families import config
from transformers import AutoConfig

from halve.cli.app import main
from halve.model.checkpoint import Checkpoint
from halve.preflight.device import gpu
from halve.preflight.family_cost import FamilyCost, cost_of_recipe, cost_of_sizes
from halve.preflight.sizes import planned_rounds
from halve.preflight.work import planned_work
from halve.recipe.read import load_recipe, parse
from halve.recipe.schema import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SCRATCH, RETRAINED = 3_800_000_000_000, 94_000_000_000
"""2407.14679, Table 2: the tokens of Nemotron-3 8B, which was trained from scratch, and of Minitron-8B."""
STEP = 1152 * 4096
"""Tokens of a training step (2407.14679, Sec. 4.1 and footnote 5)."""


@pytest.fixture(scope="module")
def papers_family(tmp_path_factory: pytest.TempPathFactory) -> FamilyCost:
    """Nemotron-4 15B and its students by the shipped recipe, whose sizes are those of 2407.14679, Table 10."""
    teacher = tmp_path_factory.mktemp("nemotron")
    sizes = {"hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 32, "vocab_size": 256_000}
    heads = {"num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128}
    AutoConfig.for_model("nemotron", **sizes, **heads, tie_word_embeddings=False).save_pretrained(teacher)
    recipe = load_recipe(RECIPES / "minitron-15b-8b-4b.yaml")
    return cost_of_recipe(recipe, Checkpoint.open(str(teacher)), scratch_tokens=SCRATCH, device=gpu("H100"))


def test_the_papers_tokens(papers_family: FamilyCost) -> None:
    """Sec. 4.1: "40x fewer training tokens for each additional model"."""
    assert [member.made.tokens for member in papers_family.members] == [SCRATCH, RETRAINED, RETRAINED]
    assert [f"{member.fewer_tokens:.0f}" for member in papers_family.members] == ["1", "40", "40"]


def test_the_papers_flops_of_a_step(papers_family: FamilyCost) -> None:
    """Sec. 4.1 prints 4.4e17, 2.5e17 and 1.2e17: it counts attention over the whole context, halve the causal half."""
    other_half = {  # three passes, two products of 2 x heads x head_dim for 2048 more keys, in 32 layers
        heads: 3 * 32 * 2 * 2 * heads * 128 * 2048 for heads in (48, 24)
    }
    found = [
        STEP * (member.scratch.flops / member.scratch.tokens + other_half[heads])
        for member, heads in zip(papers_family.members, (48, 48, 24), strict=True)
    ]
    assert [f"{flops:.1e}" for flops in found] == ["4.4e+17", "2.5e+17", "1.2e+17"]


def test_the_papers_saving(papers_family: FamilyCost) -> None:
    """Sec. 4.1: 1.8x for the family, without the teacher's passes. With them and the cut it is less."""
    assert f"{papers_family.saving_by_tokens:.1f}" == "1.8"
    assert 1.7 < papers_family.saving < papers_family.saving_by_tokens
    plain = cost_of_sizes(
        [member.params for member in papers_family.members],
        tokens=RETRAINED,
        scratch_tokens=SCRATCH,
        device=gpu("H100"),
    )
    assert f"{plain.saving_by_tokens:.1f}" == "1.8"
    assert plain.saving == pytest.approx(papers_family.saving, rel=0.02)


def small(tmp_path: Path, **changes: object) -> Recipe:
    config("llama").save_pretrained(tmp_path / "teacher")
    raw = {
        "name": "cost",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": 100},
        "prune": {"ffn": 64},
        "distill": {"tokens": 1000, "baselines": ["ce"]},
        "then": [{"prune": {"ffn": 32}, "distill": {"tokens": 2000}}],
        **changes,
    }
    return parse(raw, folder=tmp_path, source="test")


def test_the_family_of_a_recipe_is_what_its_dry_run_counts(tmp_path: Path) -> None:
    recipe = small(tmp_path, correct={"tokens": 500})
    opened = Checkpoint.open(recipe.model)
    planned = planned_rounds(recipe, opened)
    work = planned_work(recipe, planned, opened)
    family = cost_of_recipe(recipe, opened, scratch_tokens=10**6, device=gpu("H100"), price=2.0)
    teacher, first, second = family.members
    assert teacher.scratch == teacher.made
    assert first.made.tokens == 1500, "the correction is part of the family"
    assert second.made.tokens == 2000
    rows = sum(done.flops for name, done in work.items() if name not in ("distill (ce)", "evaluate"))
    assert first.made.flops + second.made.flops == pytest.approx(rows)
    second_rows = [work[f"{row}-2"].flops for row in ("score", "selection", "prune", "refit", "distill")]
    assert second.made.flops == pytest.approx(sum(second_rows))
    assert [member.params for member in family.members[1:]] == [shape.counts().params for shape in planned]
    assert family.hours(family.made_flops) == pytest.approx(family.made_flops / (989e12 * 0.4) / 3600)
    assert family.money(3.6e18) == pytest.approx(2.0 * 3.6e18 / (989e12 * 0.4) / 3600)


ALIGN = [{"kind": kind, "data": ["a.jsonl"], "tokens": tokens} for kind, tokens in (("sft", 700), ("dpo", 300))]


def costed(recipe: Recipe) -> FamilyCost:
    return cost_of_recipe(recipe, Checkpoint.open(recipe.model), scratch_tokens=10**6, device=gpu("H100"))


@pytest.mark.parametrize("then", [[], [{"prune": {"ffn": 32}, "distill": {"tokens": 2000}}]])
def test_alignment_belongs_to_the_last_student(tmp_path: Path, then: list[object]) -> None:
    plain, recipe = small(tmp_path, then=then), small(tmp_path, then=then, align=ALIGN)
    opened = Checkpoint.open(recipe.model)
    work = planned_work(recipe, planned_rounds(recipe, opened), opened)
    before, after = costed(plain).members, costed(recipe).members
    assert after[:-1] == before[:-1]
    assert after[-1].made.tokens == before[-1].made.tokens + 1000
    steps = work["align-sft"].flops + work["align-2-dpo"].flops
    assert after[-1].made.flops == pytest.approx(before[-1].made.flops + steps)


def test_alignment_belongs_to_the_student_and_not_to_those_inside_it(tmp_path: Path) -> None:
    inside = {"then": [], "nest": {"sizes": [{"ffn": 48}]}, "distill": {"tokens": 3000}}
    before, after = (costed(small(tmp_path, **inside, align=align)).members for align in ([], ALIGN))
    assert [member.name for member in after] == ["teacher", "student", "nested 2"]
    assert after[1].made.tokens == before[1].made.tokens + 1000
    assert after[1].made.flops > before[1].made.flops
    assert after[2] == before[2]


def test_a_tournament_trains_on_tokens_too(tmp_path: Path) -> None:
    searching = {"candidates": 2, "tournament": {"tokens": 800, "rungs": 2, "batch": 1}}
    plain = {"then": [], "prune": {}, "distill": {"tokens": 2000, "batch": 1}}
    recipe = small(tmp_path, **plain, search={"targets": ["70%", "50%"], **searching})
    opened = Checkpoint.open(recipe.model)
    work = planned_work(recipe, planned_rounds(recipe, opened), opened)
    found = costed(recipe).members
    assert [member.name for member in found] == ["teacher", "student 1", "student 2"]
    searched = [work["search"].tokens, work["search-2"].tokens]
    assert all(tokens >= 800 for tokens in searched)
    assert [member.made.tokens for member in found[1:]] == [2000 + tokens for tokens in searched]


def test_students_of_a_nest_share_their_training(tmp_path: Path) -> None:
    inside = {"sizes": [{"ffn": 48}, {"ffn": 32, "layers": 3}], "draws": 2}
    recipe = small(tmp_path, then=[], nest=inside, distill={"tokens": 3000})
    opened = Checkpoint.open(recipe.model)
    family = cost_of_recipe(recipe, opened, scratch_tokens=10**6, device=gpu("H100"))
    assert [member.name for member in family.members] == ["teacher", "student", "nested 2", "nested 3"]
    assert [member.made.tokens for member in family.members[1:]] == [2000, 2000, 2000]
    corrected = small(tmp_path, then=[], nest=inside, distill={"tokens": 3000}, correct={"tokens": 600})
    made = cost_of_recipe(corrected, opened, scratch_tokens=10**6, device=gpu("H100")).members[1:]
    assert [member.made.tokens for member in made] == [2200, 2200, 2200], "the teacher is corrected once"
    work = planned_work(recipe, planned_rounds(recipe, opened), opened)
    assert work["nest"].flops > 0
    del work["evaluate"]
    assert family.made_flops - family.members[0].made.flops == pytest.approx(sum(done.flops for done in work.values()))
    alone = planned_work(small(tmp_path, then=[], distill={"tokens": 3000}), planned_rounds(recipe, opened), opened)
    assert alone["distill"].flops < work["distill"].flops < 2 * alone["distill"].flops


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["cost", "--sizes", "15.6B,8.3B,4.2B", "--tokens", "94B", "--scratch", "3.8T", "--price", "2"]
    assert main(plain) == 0
    said = capsys.readouterr().out
    assert "40.4x" in said
    assert "3.8T" in said
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["teacher", "student 1", "student 2", "all"], "no cell is broken"
    assert all(len(row) == 11 for row in rows), "no column is lost"
    assert rows[-1][4:6] == ["51 years", "900k"]
    assert "without the teacher's passes and the cut, 1.77 times less" in said
    small(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "{name: cost, model: teacher, data: {train: [a], valid: [b], context: 100}, prune: {ffn: 64},"
        " distill: {tokens: 1000}}"
    )
    assert main(["cost", str(tmp_path / "recipe.yaml"), "--scratch", "1M", "--device", "a100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device"] == "one A100"
    assert [member["name"] for member in told["members"]] == ["teacher", "student"]
    assert told["members"][1]["fewer_tokens"] == 1000


def test_the_guides_folder_is_enough_for_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (RECIPES.parent / "docs/guides/family.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"^cat > nemotron-4-15b/config.json <<'END'\n(.*?)^END$", guide, flags=re.M | re.S)
    ((old, new),) = re.findall(r"^sed 's#(.*)#(.*)#' recipes/minitron-15b-8b-4b.yaml > minitron.yaml$", guide, re.M)
    command = next(line for line in guide.splitlines() if line.startswith("halve cost minitron.yaml"))
    (tmp_path / "nemotron-4-15b").mkdir()
    (tmp_path / "nemotron-4-15b" / "config.json").write_text(config, encoding="utf-8")
    recipe = (RECIPES / "minitron-15b-8b-4b.yaml").read_text(encoding="utf-8")
    (tmp_path / "minitron.yaml").write_text(recipe.replace(old, new), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    said = capsys.readouterr().out
    assert "8.27B" in said
    assert "4.19B" in said


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--sizes", "8B"], "at least two sizes"),
        (["--sizes", "4B,8B", "--tokens", "1B"], "the largest, comes first"),
        (["--sizes", "8B,4B", "--tokens", "1B", "--device", "abacus"], "known are H100"),
        (["--sizes", "8B,4B", "--tokens", "-1B"], "cannot read --tokens '-1B' as a token count"),
        (["--sizes", "8B,4B", "--tokens", "1B", "--scratch", "50%"], "cannot read --scratch '50%' as a token count"),
        (["--sizes", "8B,4X", "--tokens", "1B"], "cannot read --sizes '4X' as a parameter count"),
    ],
)
def test_what_it_refuses(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--scratch", "1T", *words]) == 2
    assert why in capsys.readouterr().err


def test_a_round_without_training_has_no_cost_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "{name: cost, model: teacher, data: {train: [a], valid: [b], context: 100}, prune: {ffn: 64}}"
    )
    assert main(["cost", str(tmp_path / "recipe.yaml"), "--scratch", "1M"]) == 2
    assert "makes a student that is not trained" in capsys.readouterr().err
