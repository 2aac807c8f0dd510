"""A cache of a teacher's answers: what it says, what it refuses, and what a kill or a full disk leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from halve.disk.files import sealed
from halve.errors import DiskError, TrainError
from halve.model.checkpoint import Checkpoint
from halve.recipe.schema import Recipe
from halve.stages import cache as stage
from halve.text import course
from halve.text.batch import Batch
from halve.train.losses import chunked, divergences
from halve.train.objectives import logits as objectives
from halve.train.teachers import answers, cache
from halve.train.teachers import live as teachers
from halve.train.teachers.cache import HELDOUT, CachedDraws, CachedHidden, Store

MakeRecipe = Callable[..., Recipe]
TRAINING = {"tokens": 6 * 4 * 32, "batch": 4, "micro_batch": 2, "eval_samples": 3}
SHARD_BYTES = 40_000  # of hidden states: about nine samples


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def made(make_recipe: MakeRecipe, tiny_llama: Path, work: Path) -> Callable[..., tuple[Recipe, Path, dict[str, Any]]]:
    """Write the cache of a recipe once: `made(cache="hidden", ...)`."""
    known: dict[str, tuple[Recipe, Path, dict[str, Any]]] = {}

    def make(data: dict[str, Any] | None = None, **keys: Any) -> tuple[Recipe, Path, dict[str, Any]]:
        name = json.dumps([data, keys])
        if name not in known:
            recipe = make_recipe(distill=TRAINING | keys)
            if data is not None:
                recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
            out = work / str(len(known))
            out.mkdir()
            known[name] = (recipe, out, written(recipe, tiny_llama, out))
        return known[name]

    return make


def written(recipe: Recipe, teacher: Path, out: Path) -> dict[str, Any]:
    return stage.run(
        recipe, teacher=Checkpoint.open(teacher), cache=out.parent / "data", out=out, shard_bytes=SHARD_BYTES
    )


def opened(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, work: Path) -> tuple[course.Course, Batch]:
    assert recipe.distill is not None
    where = {"cache": work / "data", "tokenizer": tokenizer}
    return course.open_course(recipe, recipe.distill, **where), course.open_heldout(recipe, recipe.distill, **where)


def live(recipe: Recipe, teacher: Path) -> teachers.Live:
    assert recipe.distill is not None
    return teachers.load_teacher(Checkpoint.open(teacher), recipe.distill, dtype="auto", device="cpu", half=False)[1]


@pytest.mark.parametrize("documents", ["joined", "apart"])
def test_hidden_states_are_those_of_the_live_teacher(
    documents: str, made: Any, tiny_llama: Path, tokenizer: PreTrainedTokenizerFast, work: Path
) -> None:
    recipe, out, metrics = made({"documents": documents}, cache="hidden")
    store, (drawn, heldout) = Store.open(out), opened(recipe, tokenizer, work)
    head, alive = store.head("cpu"), live(recipe, tiny_llama)
    assert torch.equal(head.weight, alive.head.weight)
    assert store.facts.ce == metrics["teacher_ce"] > 0
    cached = CachedHidden(store, head)
    for step in range(1, drawn.steps + 1):
        for part in drawn.batch(step).split(2):
            found, want = cached.answer(part), alive.answer(part)
            assert torch.allclose(found.states, want.states, atol=1e-6, rtol=0)
            assert found.states.dtype == torch.float32
    held = CachedHidden(store, head, HELDOUT).answer(heldout)
    assert torch.allclose(held.states, alive.answer(heldout).states, atol=1e-6, rtol=0)


def test_half_precision_is_kept_as_it_is_computed(
    made: Any, tiny_llama: Path, tokenizer: PreTrainedTokenizerFast, work: Path
) -> None:
    recipe, out, _ = made(cache="hidden", precision="bfloat16")
    store, (drawn, _) = Store.open(out), opened(recipe, tokenizer, work)
    part = next(drawn.batch(1).split(2))
    alive = teachers.load_teacher(Checkpoint.open(tiny_llama), recipe.distill, dtype="auto", device="cpu", half=True)[1]
    with torch.autocast("cpu", torch.bfloat16):
        want = alive.answer(part).states
    found = CachedHidden(store, store.head("cpu")).answer(part).states
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, want.bfloat16())


def test_drawn_logits_are_draws_of_the_live_teacher(
    made: Any, tiny_llama: Path, tokenizer: PreTrainedTokenizerFast, work: Path
) -> None:
    """The mean of many draws is the teacher's distribution, at the temperature and whatever else was asked."""
    recipe, out, _ = made(cache="logits", cache_samples=4000, temperature=2.0)
    drawn, _ = opened(recipe, tokenizer, work)
    batch = drawn.batch(2)
    found = CachedDraws(Store.open(out)).answer(batch)
    states, head = live(recipe, tiny_llama).answer(batch)
    p = torch.softmax(head.logits(states) / 2, -1)
    dense = torch.zeros_like(p).scatter_add_(1, found.ids, found.shares)
    sigma = (p * (1 - p) / 4000).sqrt()
    assert bool(((dense - p).abs() < 6 * sigma + 1 / 4000).all())
    assert torch.allclose(found.entropy, -(p * p.log()).sum(-1), atol=1e-4)


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_the_size_is_what_was_said(kind: str, made: Any) -> None:
    _, out, metrics = made(cache=kind)
    on_disk = sum(path.stat().st_size for path in out.glob("train-*"))
    assert metrics["bytes"] == on_disk
    most = answers.answer_bytes(kind, hidden=32, vocab=320, samples=16, half=False) * metrics["tokens"]
    headers = 100 * 3 * metrics["samples"] + 200 * len(list(out.glob("train-*")))
    assert 0.3 * most < on_disk < most + headers
    assert metrics["samples"] == 24
    assert metrics["tokens"] == 24 * 32


def test_a_sample_that_comes_twice_is_answered_once(made: Any, tokenizer: PreTrainedTokenizerFast, work: Path) -> None:
    recipe, out, metrics = made({"context": 128}, cache="logits", tokens=300 * 4 * 128)
    drawn, _ = opened(recipe, tokenizer, work)
    numbers = [n for step in range(1, drawn.steps + 1) for n in drawn.batch(step).numbers]
    assert metrics["samples"] == len(set(numbers)) < len(numbers)
    listed = load_file(out / cache.SAMPLES)[cache.TRAIN].tolist()
    assert listed == list(dict.fromkeys(numbers))  # in the order of their first draws
    Store.open(out).require_samples(numbers)


def test_phases_of_another_context_are_answered_too(made: Any, tokenizer: PreTrainedTokenizerFast, work: Path) -> None:
    recipe, out, metrics = made(cache="logits", phases=[{"from_tokens": 3 * 4 * 32, "context": 64}])
    drawn, _ = opened(recipe, tokenizer, work)
    batches = [drawn.batch(step) for step in range(1, drawn.steps + 1)]
    assert {batch.ids.shape[1] for batch in batches} == {32, 64}
    assert metrics["tokens"] == sum(batch.ids.numel() for batch in batches)
    found = [CachedDraws(Store.open(out)).answer(batch) for batch in batches]
    assert [len(one.entropy) for one in found] == [batch.labels().numel() for batch in batches]


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"teacher": "0" * 64}, "teacher"),
        ({"tokenizer": "0" * 64}, "tokenizer"),
        ({"corpus": "0" * 64}, "text, or of samples cut otherwise"),
        ({"heldout": "0" * 64}, "held-out text"),
        ({"context": 64}, "context"),
        ({"documents": "apart"}, "setting of data.documents"),
        ({"kind": "hidden"}, "kind"),
        ({"vocab": 321}, "vocabulary"),
        ({"draws": 17}, "number of draws"),
        ({"temperature": 2.0}, "temperature"),
    ],
)
def test_answers_to_something_else_are_refused(change: dict[str, Any], word: str, made: Any) -> None:
    store = Store.open(made(cache="logits")[1])
    store.require(store.bound)
    with pytest.raises(TrainError, match=f"is of another {word}\n  why: it was made for .*\n  fix: run halve cache"):
        store.require(replace(store.bound, **change))


def test_what_binds_a_cache_changes_with_what_it_names(
    made: Any, tokenizer: PreTrainedTokenizerFast, work: Path, corpus: Path
) -> None:
    recipe, out, _ = made(cache="logits")

    def bound(recipe: Recipe) -> cache.Bound:
        drawn, heldout = opened(recipe, tokenizer, work)
        assert recipe.distill is not None
        facts: dict[str, Any] = {"tokenizer": tokenizer, "course": drawn, "heldout": heldout, "vocab": 320}
        return answers.bound_to(recipe, recipe.distill, teacher=Checkpoint.open(recipe.model).fingerprint, **facts)

    def data(**change: Any) -> Recipe:
        return recipe.model_copy(update={"data": recipe.data.model_copy(update=change)})

    assert bound(recipe) == Store.open(out).bound
    other_text = work / "other.txt"
    other_text.write_text((corpus / "train.txt").read_text() + " More.")
    assert bound(data(train=(str(other_text),))).corpus != bound(recipe).corpus
    assert bound(data(valid=(str(other_text),))).heldout != bound(recipe).heldout
    assert bound(data(context=16)).corpus != bound(recipe).corpus
    assert bound(data(documents="apart")).corpus != bound(recipe).corpus


def test_a_missing_sample_is_named(made: Any, tokenizer: PreTrainedTokenizerFast, work: Path) -> None:
    _, out, _ = made(cache="hidden")
    store = Store.open(out)
    has = set(load_file(out / cache.SAMPLES)[cache.TRAIN].tolist())
    missing = min(set(range(1000)) - has)
    batch = Batch(torch.zeros(1, 32, dtype=torch.int64), (missing,))
    with pytest.raises(TrainError, match=f"no answer for sample {missing}\n  why: it holds 24 other samples"):
        CachedHidden(store, store.head("cpu")).answer(batch)
    with pytest.raises(TrainError, match=f"no answer for sample {missing}"):
        store.require_samples([*has, missing])


def test_a_vocabulary_that_the_student_shares_in_part_is_refused_for_draws(made: Any) -> None:
    Store.open(made(cache="logits")[1]).require_vocab(320)
    Store.open(made(cache="hidden")[1]).require_vocab(300)
    with pytest.raises(TrainError, match="its draws are of 320 tokens, teacher and student share 300"):
        Store.open(made(cache="logits")[1]).require_vocab(300)


def test_damage_is_told(made: Any, tmp_path: Path) -> None:
    _, good, _ = made(cache="hidden")
    numbers = load_file(good / cache.SAMPLES)[cache.TRAIN].tolist()
    batch = Batch(torch.zeros(1, 32, dtype=torch.int64), (numbers[0],))
    with pytest.raises(TrainError, match="there is no cache in"):
        Store.open(tmp_path)
    for name, harm in (
        ("train-000000.safetensors", Path.unlink),
        ("train-000000.safetensors", lambda path: os.truncate(path, path.stat().st_size // 2)),
        (cache.SAMPLES, Path.unlink),
        (cache.HEAD, lambda path: os.truncate(path, 20)),
    ):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        harm(folder / name)
        store = Store.open(folder)
        with pytest.raises(TrainError, match="cannot read the cache in"):
            CachedHidden(store, store.head("cpu")).answer(batch)
    (folder / cache.INDEX).write_text(json.dumps(sealed({"format": 0})))
    with pytest.raises(TrainError, match="its format is 0"):
        Store.open(folder)


# ---- kills and full disks ------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_a_killed_writer_goes_on_with_the_next_shard(kind: str, made: Any, tiny_llama: Path, tmp_path: Path) -> None:
    recipe, whole, _ = made(cache=kind, cache_samples=200)
    out = tmp_path / "out"
    out.mkdir()
    place = tmp_path / "recipe.json"
    place.write_text(recipe.model_dump_json())
    driver = Path(__file__).with_name("cache_driver.py")
    command = [sys.executable, str(driver), str(place), str(tiny_llama), str(out), str(SHARD_BYTES), "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (out / cache.INDEX).exists()
    left = {path.name: path.stat().st_mtime_ns for path in out.glob("train-*")}
    assert len(left) == 2
    with pytest.raises(TrainError, match="there is no cache in"):
        Store.open(out)
    written(recipe, tiny_llama, out)
    assert {name: (out / name).stat().st_mtime_ns for name in left} == left  # not written again
    assert contents(out) == contents(whole)


def test_shards_of_another_cache_are_written_again(made: Any, tiny_llama: Path, tmp_path: Path) -> None:
    recipe, whole, _ = made(cache="logits")
    out = tmp_path / "out"
    shutil.copytree(made(cache="logits", temperature=2.0)[1], out)
    (out / "train-000000.safetensors").write_bytes(b"cut off")
    written(recipe, tiny_llama, out)
    assert contents(out) == contents(whole)


def test_a_full_disk_loses_no_shard(
    made: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole, _ = made(cache="hidden")
    out = tmp_path / "out"
    out.mkdir()
    saved = 0

    def save(tensors: Any, path: Path, **kwargs: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 3:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", save)
        with pytest.raises(DiskError, match=r"no room left while writing .*train-000002"):
            written(recipe, tiny_llama, out)
    assert sorted(path.name for path in out.iterdir()) == ["train-000000.safetensors", "train-000001.safetensors"]
    for path in out.iterdir():
        with safe_open(path, "pt") as file:
            assert file.keys()
    written(recipe, tiny_llama, out)
    assert contents(out) == contents(whole)


# ---- what students learn from it -----------------------------------------------------------------------------


def test_losses_and_gradients_are_those_of_the_live_teacher(
    made: Any, tiny_llama: Path, tokenizer: PreTrainedTokenizerFast, work: Path
) -> None:
    recipe, out, _ = made(cache="hidden")
    store, (drawn, heldout) = Store.open(out), opened(recipe, tokenizer, work)
    alive = live(recipe, tiny_llama)
    student = Checkpoint.open(tiny_llama).load()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    body, head = teachers.split(student)
    part = next(drawn.batch(1).split(2))
    terms: list[tuple[float, divergences.TeacherRows]] = [(0.5, divergences.kl_rows), (2.0, divergences.mse_rows)]
    found = []
    for teacher in (alive, CachedHidden(store, store.head("cpu"))):
        student.zero_grad()
        loss, _ = objectives.distillation(teacher, vocab=320, terms=terms, ce=0.25)(body, head, part)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in student.parameters())])
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(*found, strict=True))
    held = CachedHidden(store, store.head("cpu"), HELDOUT)
    figures = [
        objectives.heldout_divergence(teacher, heldout, vocab=320, micro_batch=2)(body, head)
        for teacher in (alive, held)
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


def test_draws_give_the_gradient_of_kl_in_expectation(
    made: Any, tiny_llama: Path, tokenizer: PreTrainedTokenizerFast, work: Path
) -> None:
    """Through files: many draws come within their own spread of the whole distribution's loss."""
    recipe, out, _ = made(cache="logits", cache_samples=4000)
    drawn, _ = opened(recipe, tokenizer, work)
    batch = drawn.batch(1)
    alive = live(recipe, tiny_llama)
    student = torch.Generator().manual_seed(0)
    states, head = alive.answer(batch)
    hidden = (states + 2 * torch.randn(states.shape, generator=student)).requires_grad_()
    found = []
    for target in (
        chunked.follow(states, head, divergences.kl_rows, vocab=320),
        chunked.follow_draws(CachedDraws(Store.open(out)).answer(batch)),
    ):
        loss = chunked.chunked(hidden, head, target, vocab=320, chunk=64)
        found.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    (kl, want), (estimate, gradient) = found
    assert estimate == pytest.approx(float(kl), rel=0.05)
    assert float((gradient - want).norm() / want.norm()) < 0.05
