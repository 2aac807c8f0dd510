"""Held-out figures beside those by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from halve.align import measured
from halve.align.examples import Dialogue, Preference
from halve.model import saving
from halve.model.checkpoint import Checkpoint
from halve.report.sections import estimate


@torch.no_grad()
def by_hand(model: PreTrainedModel, ids: list[int], counts: list[bool]) -> float:
    logs = model.double()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, ids[i]]) for i in range(1, len(ids)) if counts[i])


def test_log_probabilities_are_those_of_each_row_alone(
    model: PreTrainedModel, talks: list[Dialogue], pairs: list[Preference]
) -> None:
    talks, pairs = talks[:5], pairs[:5]
    of_talks, of_pairs = measured.dialogue_logps(model, talks), measured.pair_logps(model, pairs)
    assert of_talks.dtype == torch.float64
    want = [by_hand(model, talk.ids.tolist(), talk.counts.tolist()) for talk in talks]
    assert of_talks.tolist() == pytest.approx(want, rel=1e-5)
    for row, name in enumerate(("chosen", "rejected")):
        want = []
        for pair in pairs:
            answer = getattr(pair, name)
            counts = [False] * len(pair.prompt) + [True] * len(answer)
            want.append(by_hand(model, [*pair.prompt, *answer], counts))
        assert of_pairs[row].tolist() == pytest.approx(want, rel=1e-5)


def test_a_batch_of_any_size_gives_the_same(
    model: PreTrainedModel, talks: list[Dialogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured.dialogue_logps(model, talks)
    monkeypatch.setattr(measured, "_TOKENS", 1)
    torch.testing.assert_close(measured.dialogue_logps(model, talks), whole, rtol=1e-6, atol=1e-6)


def test_accuracy_counts_what_was_gained_and_a_tie_half() -> None:
    pairs = [Preference([1], [2], [3], gap) for gap in (1.0, 2.0, 0.5, 3.0, 0.0)]
    before = torch.tensor([[-5.0, -5.0, -5.0, -1.0, -1.0], [-4.0, -4.0, -4.0, -2.0, -2.0]]).double()
    after = before.clone()
    after[0] += torch.tensor([2.0, 0.5, 0.0, -1.5, 9.0])
    told = measured.told_of_pairs(pairs, before, after, beta=0.5)
    assert told["heldout"] == 4  # the last pair has no better answer
    assert told["accuracy"]["value"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert told["likelier_before"]["value"] == pytest.approx(1 / 4)
    assert told["likelier_after"]["value"] == pytest.approx(1 / 4)
    assert told["likelier_gain"] == {"value": 0.0, "stderr": pytest.approx(np.std([1, 0, 0, -1], ddof=1) / 2)}
    assert told["margin"]["value"] == pytest.approx(0.5 * (2.0 + 0.5 + 0.0 - 1.5) / 4)
    start = measured.told_of_pairs(pairs, before, before, beta=0.5)
    assert start["accuracy"] == {"value": 0.5, "stderr": 0.0}


def test_pairs_without_a_better_answer_have_no_accuracy() -> None:
    pairs = [Preference([1], [2], [3], 0.0)] * 3
    before, after = torch.zeros(2, 3).double(), torch.ones(2, 3).double()
    assert measured.told_of_pairs(pairs, before, after, beta=0.1) == {"heldout": 0}


def test_one_pair_has_no_standard_error_and_its_halve_json_is_json(tiny_llama: Path, tmp_path: Path) -> None:
    before, after = torch.zeros(2, 1).double(), torch.tensor([[1.0], [0.0]]).double()
    told = measured.told_of_pairs([Preference([1], [2], [3], 1.0)], before, after, beta=0.1)
    assert math.isnan(told["accuracy"]["stderr"])
    saving.save_model(Checkpoint.open(tiny_llama).load(), tmp_path / "out", extra_from=None, record=told)
    written = (tmp_path / "out" / "halve.json").read_text(encoding="utf-8")
    kept = json.loads(written, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert kept["accuracy"] == {"value": 1.0, "stderr": None}
    cell = estimate(kept["likelier_gain"] | {"value": 0.5}, percent=True, signed=True)
    assert (cell.value, cell.error, cell.clear) == ("+50.0", "", False)


def test_nats_are_means_over_tokens() -> None:
    talks = [Dialogue(np.arange(n, dtype=np.int32), np.ones(n, dtype=np.bool_)) for n in (3, 5)]
    before, after = torch.tensor([-4.0, -4.0]).double(), torch.tensor([-2.0, -1.0]).double()
    told = measured.told_of_dialogues(talks, before, after)
    assert told["nats_before"]["value"] == pytest.approx(8 / 6)
    assert told["nats_after"]["value"] == pytest.approx(3 / 6)
    assert told["nats_gain"]["value"] == pytest.approx(-5 / 6)
