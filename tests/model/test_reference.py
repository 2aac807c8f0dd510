"""A teacher's distributions that are kept, against computing both anew."""

from __future__ import annotations

import pytest
import torch
from families import config

from halve.anatomy import discover
from halve.cut.proof.twins import random_twin
from halve.errors import CorpusError
from halve.model import measure
from halve.model.reference import Reference, affordable


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("micro_batch", [2, 5])
def test_it_is_the_divergence(family: str, micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy = discover(config(family)).twin()
    teacher, student = (random_twin(anatomy, seed=seed).float().requires_grad_(False) for seed in (0, 1))
    samples = torch.randint(anatomy.sizes.vocab, (5, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(measure, "CHUNK_ELEMENTS", 7 * anatomy.sizes.vocab)  # rows come in several chunks
    found = Reference(teacher, samples, micro_batch=micro_batch).divergences(student)
    wanted = measure.divergence(student, teacher, samples, micro_batch=micro_batch).kl
    torch.testing.assert_close(found, wanted.double(), rtol=1e-4, atol=1e-5)


def test_a_teacher_is_next_to_nothing_from_itself() -> None:
    anatomy = discover(config("llama")).twin()
    teacher = random_twin(anatomy, seed=0).float().requires_grad_(False)
    samples = torch.randint(anatomy.sizes.vocab, (3, 12), generator=torch.Generator().manual_seed(0))
    assert Reference(teacher, samples, micro_batch=2).divergences(teacher).abs().max() < 1e-5


def test_samples_beyond_the_context_are_refused() -> None:
    anatomy = discover(config("llama", max_position_embeddings=8)).twin()
    with pytest.raises(CorpusError, match="context"):
        Reference(random_twin(anatomy, seed=0), torch.zeros(1, 12, dtype=torch.int64), micro_batch=1)


def test_large_vocabularies_leave_fewer_samples() -> None:
    assert [affordable(16, 512, vocab) for vocab in (32_000, 128_000, 256_000)] == [16, 4, 2]
    assert affordable(1, 512, 256_000) == 1
