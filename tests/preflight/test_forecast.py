from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from halve.anatomy.configs import resized
from halve.cli.app import main
from halve.model.head import split
from halve.preflight import rehearsal
from halve.preflight.device import card
from halve.preflight.forecast import Forecast, forecast
from halve.recipe.read import parse
from halve.report import tables as show
from halve.text.batch import Batch
from halve.train.objectives import logits as objectives
from halve.train.teachers.live import Live


def test_the_work_of_distillation(tmp_path: Path) -> None:
    """Work per token = (2 N_T + a_T) + 3 (2 N_S + a_S) + V (6 H_S + 2 H_T), written out for a small llama."""
    teacher = config("llama", tie_word_embeddings=False)
    teacher.save_pretrained(tmp_path / "teacher")
    raw = {
        "name": "cost",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": 100},
        "prune": {"hidden": 48, "ffn": 64},
        "distill": {"tokens": 1000, "baselines": ["ce"]},
        "correct": {"tokens": 500},
    }
    found = forecast(parse(raw, folder=tmp_path, source="test"))
    layers, heads, groups, head_dim, vocab = 6, 6, 3, 20, 128
    attention = layers * 2 * 2 * heads * head_dim * 50  # two products, two operations, 50 of 100 keys on average

    def body(hidden: int, ffn: int) -> int:
        return layers * (2 * hidden * heads * head_dim + 2 * hidden * groups * head_dim + 3 * hidden * ffn)

    once = 2 * body(96, 160) + attention + 2 * vocab * 96
    student = 2 * body(48, 64) + attention + 2 * vocab * 48
    assert found.flops["distill"] == 1000 * (once + 3 * student)
    assert found.flops["distill (ce)"] == 1000 * 3 * student
    assert found.flops["correct"] == 500 * 3 * once
    assert found.flops["score"] == 256 * 100 * (once - 2 * vocab * 96) + 8 * 100 * once  # boundaries: with logits
    assert list(found.flops) == [
        "correct",
        "score",
        "selection",
        "prune",
        "refit",
        "distill",
        "distill (ce)",
        "evaluate",
    ]
    assert found.memory["distill"].masters_bytes == 4 * found.student_counts.params
    assert found.fits


def test_rounds_and_random_cuts_have_their_own_rows(tmp_path: Path) -> None:
    config("llama").save_pretrained(tmp_path / "teacher")
    raw = {
        "name": "cost",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": 100},
        "prune": {"ffn": 64, "refit": "none"},
        "distill": {"tokens": 1000, "baselines": ["random_prune"]},
        "then": [{"prune": {"ffn": 32, "refit": "outputs"}}],
    }
    found = forecast(parse(raw, folder=tmp_path, source="test"))
    rows = ["score", "prune", "prune (random)", "distill", "distill (random_prune)", "score-2"]
    rows += ["selection-2", "prune-2", "refit-2", "evaluate"]
    assert list(found.flops) == list(found.tokens) == rows
    assert list(found.held) == ["prune", "prune-2", "evaluate"]
    assert found.held["prune"].states_bytes == 0 < found.held["prune-2"].states_bytes, "only the second one is refit"
    assert found.flops["score-2"] < found.flops["score"], "the second round scores the first student"
    sibling = {**raw, "then": [{"prune": {"ffn": 32, "refit": "outputs"}, "cut": "original"}]}
    beside = forecast(parse(sibling, folder=tmp_path, source="test"))
    assert list(beside.flops) == [row for row in rows if row != "score-2"], "both are ranked by the same scores"
    assert beside.flops["prune-2"] > found.flops["prune-2"], "the teacher is larger than the first student"
    trial = forecast(parse({**raw, "prune": {"non_embedding_ratio": 0.5}, "then": []}, folder=tmp_path, source="test"))
    by_hand = forecast(parse({**raw, "then": []}, folder=tmp_path, source="test"))
    assert "trial" not in by_hand.flops
    assert trial.flops["trial"] > 0


def test_students_inside_the_student_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config("llama").save_pretrained(tmp_path / "teacher")
    raw = {
        "name": "nest",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": 100},
        "prune": {"ffn": 64},
        "distill": {"tokens": 1000, "batch": 4},
        "nest": {"sizes": [{"ffn": 48}, {"hidden": 48, "layers": 3}]},
    }
    alone, one, two = (
        forecast(parse(given, folder=tmp_path, source="test"))
        for given in (
            {**raw, "nest": None},
            raw,
            {**raw, "nest": {**raw["nest"], "draws": 2}},  # type: ignore[dict-item]
        )
    )
    assert [(made.student.ffn, made.student.hidden, made.student.layers) for made in one.nested] == [
        (48, 96, 6),
        (48, 48, 3),
    ]
    assert list(one.flops)[-3:] == ["nest", "distill", "evaluate"]
    assert one.flops["distill"] < alone.flops["distill"] < two.flops["distill"]
    assert one.memory["distill"].passing_bytes > alone.memory["distill"].passing_bytes
    assert two.memory["distill"].passing_bytes > one.memory["distill"].passing_bytes
    assert one.disk.model_bytes > alone.disk.model_bytes
    show.forecast_tables(one)
    assert "nested 3" in capsys.readouterr().out


def test_every_phase_costs_what_its_context_does(tmp_path: Path) -> None:
    config("llama").save_pretrained(tmp_path / "teacher")

    def found(context: int, *phases: dict[str, int]) -> Forecast:
        raw = {
            "name": "cost",
            "model": "teacher",
            "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": context},
            "prune": {"ffn": 64},
            "correct": {"tokens": 12_800, "batch": 32, "phases": phases},
            "distill": {"tokens": 12_800, "batch": 32, "micro_batch": 2, "baselines": ["ce"], "phases": phases},
        }
        return forecast(parse(raw, folder=tmp_path, source="test"))

    short, long = found(100), found(200)
    mixed = found(100, {"from_tokens": 3000, "context": 200})  # one step of 3200 tokens, then the longer samples
    for name in ("correct", "distill", "distill (ce)"):
        assert mixed.tokens[name] == 12_800
        assert short.flops[name] < long.flops[name]
        assert mixed.flops[name] == pytest.approx(0.25 * short.flops[name] + 0.75 * long.flops[name], rel=1e-12)
    assert mixed.flops["score"] == short.flops["score"]
    assert mixed.memory == long.memory != short.memory


def test_a_head_of_its_own_is_counted_and_a_trial_is_said(tmp_path: Path) -> None:
    teacher = config("llama", tie_word_embeddings=True)
    teacher.save_pretrained(tmp_path / "teacher")
    raw = {"name": "cost", "model": "teacher", "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": 100}}

    def found(**prune: object):  # type: ignore[no-untyped-def]
        return forecast(parse({**raw, "prune": prune}, folder=tmp_path, source="test"))

    tied, untied = found(hidden=48), found(hidden=48, untie=True)
    assert untied.student_counts.params - tied.student_counts.params == 128 * 48
    assert untied.teacher_counts == tied.teacher_counts
    assert tied.trial == ((),)
    tried = found(non_embedding_ratio=0.5)
    assert len({arch.layers for arch in tried.trial[0]}) > 1
    assert len(set(tried.trial[0])) == len(tried.trial[0])
    assert found(non_embedding_ratio=0.5, shape="width").trial == ((),)


def test_a_cache_costs_disk_and_saves_the_teachers_work(tmp_path: Path) -> None:
    config("llama").save_pretrained(tmp_path / "teacher")
    raw = {
        "name": "cost",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": 100},
        "prune": {"ffn": 64},
    }

    def found(**keys: object) -> Forecast:
        distill = {"tokens": 1000, "baselines": ["random_init", "ce"], **keys}
        return forecast(parse({**raw, "distill": distill}, folder=tmp_path, source="test"), device=card())

    none, hidden, logits = found(), found(cache="hidden"), found(cache="logits", cache_samples=16)
    assert none.disk.cache_bytes == 0
    assert hidden.disk.cache_bytes == 1000 * 96 * 2
    assert found(cache="hidden", precision="float32").disk.cache_bytes == 1000 * 96 * 4
    assert logits.disk.cache_bytes == 1000 * (16 * 2 + 1 + 4)  # 128 tokens with up to 16 counts: two bytes
    assert hidden.disk.total_bytes - none.disk.total_bytes == hidden.disk.cache_bytes
    assert "cache" not in none.flops
    once, own, head = logits.flops["cache"], none.flops["distill (ce)"], 1000 * 2 * 128 * 96
    assert none.flops["distill"] == once + own
    assert hidden.flops["cache"] == once - head
    assert logits.flops["distill"] == logits.flops["distill (random_init)"] == own
    assert hidden.flops["distill"] == own + head  # the teacher's logits are made of its states
    assert hidden.flops["distill (ce)"] == own


def test_the_work_is_what_is_counted(tmp_path: Path) -> None:
    """FLOPs of a real step, forward and back, by PyTorch's counter of products."""
    teacher = config("llama", tie_word_embeddings=False)
    teacher.save_pretrained(tmp_path / "teacher")
    raw = {
        "name": "cost",
        "model": "teacher",
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "context": 33},
        "prune": {"hidden": 48, "ffn": 64},
        "distill": {"tokens": 4 * 33, "batch": 4},
    }
    recipe = parse(raw, folder=tmp_path, source="test")
    planned = forecast(recipe)
    own = resized(teacher, {"hidden": 48, "ffn": 64})
    student, its = (AutoModelForCausalLM.from_config(one, attn_implementation="eager") for one in (own, teacher))
    assert sum(p.numel() for p in student.parameters()) == planned.student_counts.params
    objective = objectives.distillation(Live(*split(its.requires_grad_(False))), vocab=128)
    batch = Batch(torch.randint(128, (4, 33)), tuple(range(4)))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(objective(*split(student), batch)[0])
    assert planned.flops["distill"] == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A recipe that distills a mixture of experts."""
    config("mixtral", num_local_experts=4, num_hidden_layers=2).save_pretrained(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("some words\n" * 100, encoding="utf-8")
    path = tmp_path / "mixture.yaml"
    path.write_text(
        "{name: mixture, model: teacher, data: {train: [text.txt], valid: [text.txt], context: 16},"
        " prune: {layers: 1}, distill: {tokens: 1000, batch: 4}}",
        encoding="utf-8",
    )
    return path


def test_a_mixture_is_planned_by_the_command(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(mixture), "--dry-run"]) == 0
    page = capsys.readouterr().out
    assert "activations and loss" in page
    assert "no plan could be made" not in page


@pytest.mark.parametrize("failing", ["halve.preflight.rehearsal._play", "halve.preflight.forecast.forecast"])
def test_a_plan_that_cannot_be_made_stops_nothing(
    failing: str, mixture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise IndexError("a family's own code\nlooked at contents")

    ran: list[Path] = []
    monkeypatch.setattr(failing, broken)
    monkeypatch.setattr(rehearsal, "_rehearsed", {})
    monkeypatch.setattr("halve.pipeline.run.run", lambda *_, **__: [ran.append(mixture), mixture.parent][1])
    monkeypatch.setattr("halve.cli.app._show_results", lambda *_, **__: None)
    assert main(["run", str(mixture)]) == 0
    assert ran
    said = capsys.readouterr().err
    if failing.endswith("forecast"):
        assert "no plan could be made: IndexError: a family's own code looked at contents\n" in said
        return
    assert "plan: distill takes over " in said
    assert main(["run", str(mixture), "--dry-run"]) == 0
    page = capsys.readouterr().out
    assert "the memory of activations is not known: IndexError: a family's own code looked at contents" in page
