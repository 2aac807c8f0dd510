"""Times of layers: what is interpolated between measured widths, and whose file it is."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from halve.anatomy import Anatomy, Arch, discover
from halve.cli.app import main
from halve.disk.files import read_json, write_json
from halve.errors import RunError
from halve.recipe.searching import Search
from halve.search import latency
from halve.search.latency import TimeTable, machine_key, needed, nodes
from halve.search.space import Space, legal_shapes
from halve.search.timing import BlockTimes, Condition, Pace, time_blocks

HERE = Condition(2, 16)
SEARCH = Search.model_validate(
    {
        "budget": {
            "decode_latency": {"max": "1s", "batch": 2, "context": 16},
            "throughput": {"min": "1", "batch": 2, "context": 16},
        }
    }
)


@cache
def anatomy() -> Anatomy:
    return discover(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=8,
            vocab_size=96,
            pad_token_id=None,
        )
    )


def products(arch: Arch) -> BlockTimes:
    """Times in proportion to the matrix products of a layer, and of a head."""
    block = 1e-9 * arch.hidden * (3 * arch.ffn + 16 * (arch.heads + arch.kv_heads))
    return BlockTimes(block, 1e-9 * arch.hidden * arch.vocab, block / 7, 1e-8 * arch.hidden)


def table() -> TimeTable:
    archs = nodes(anatomy(), legal_shapes(anatomy(), SEARCH))
    return TimeTable(anatomy().sizes, {HERE: {arch: products(arch) for arch in archs}})


def test_times_that_follow_from_matrix_products_are_interpolated_exactly() -> None:
    """On every legal shape, most of which are none of the few that were measured."""
    space = legal_shapes(anatomy(), SEARCH)
    assert len(nodes(anatomy(), space)) < 16 < len(space.widths) * len(space.ffns)
    for layers in (1, 3):
        prefill = table().prefill_seconds(space, layers, batch=2, context=16)
        decode = table().decode_seconds(space, layers, batch=2, context=16)
        assert prefill.shape == decode.shape == (len(space.widths), len(space.ffns))
        for width, ffn in [(0, 0), (5, 3), (20, 7), (len(space.widths) - 1, len(space.ffns) // 2)]:
            times = products(space.arch(layers, width, ffn))
            assert prefill[width, ffn] == pytest.approx(times.prefill_rest + layers * times.prefill_block)
            assert decode[width, ffn] == pytest.approx(times.decode_rest + layers * times.decode_block)


def test_one_hidden_and_one_ffn_need_no_second_point() -> None:
    frozen = SEARCH.model_copy(update={"axes": {"hidden": "frozen", "ffn": "frozen"}})
    archs = nodes(anatomy(), legal_shapes(anatomy(), frozen))
    assert {(arch.hidden, arch.ffn) for arch in archs} == {(64, 128)}
    times = TimeTable(anatomy().sizes, {HERE: {arch: products(arch) for arch in archs}})
    half = Space.alone(anatomy(), anatomy().sizes.at(heads=6, kv_heads=3))
    wanted = products(anatomy().sizes.at(heads=6, kv_heads=3))
    assert times.prefill_seconds(half, 2, batch=2, context=16) == pytest.approx(
        np.array([[wanted.prefill_rest + 2 * wanted.prefill_block]])
    )


def test_each_batch_and_context_is_timed_once() -> None:
    assert SEARCH.budget is not None
    assert needed(SEARCH.budget) == [HERE]


def test_a_time_past_the_models_positions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 has learned 64 positions. The tokens that are timed behind a prompt of 64 need more."""
    GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--most", "1", "--budget"]
    assert main([*words, "decode_latency<=90%@1x65"]) == 2
    said = capsys.readouterr().err
    assert "decode_latency at context 65 cannot be timed: this gpt2 has less\n" in said
    assert "why: its config allows 64 tokens\n" in said
    assert "fix: set its context to 64 or less; in a flag, @1x64 behind the amount\n" in said
    assert main([*words, "decode_latency<=90%@1x64"]) == 0


def test_a_layer_takes_time_and_so_does_the_rest() -> None:
    sizes = anatomy().sizes
    pace = Pace(anatomy(), HERE, device="cpu", dtype=torch.float32)
    found = time_blocks(anatomy(), [sizes, sizes.at(ffn=64)], pace, rounds=5)
    assert list(found) == [sizes, sizes.at(ffn=64)]
    for times in found.values():
        assert 0 < times.prefill_block < 1
        assert 0 < times.decode_block < 1
        assert min(times.prefill_rest, times.decode_rest) > 0


def test_a_file_is_read_again_by_the_same_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Arch] = []

    def timed(anatomy: Anatomy, archs: Any, pace: Any) -> dict[Arch, BlockTimes]:
        asked.extend(archs)
        return {arch: products(arch) for arch in archs}

    monkeypatch.setattr(latency, "time_blocks", timed)
    path = tmp_path / "times.json"
    first = TimeTable.measured(anatomy(), SEARCH, path=path, device="cpu")
    count = len(asked)
    assert count == len(nodes(anatomy(), legal_shapes(anatomy(), SEARCH)))
    again = TimeTable.measured(anatomy(), SEARCH, path=path, device="cpu")
    assert len(asked) == count
    assert again.times == first.times
    kept = read_json(path)
    assert list(kept) == [machine_key(anatomy(), "cpu", torch.float32)]
    write_json(path, {"another machine": kept[next(iter(kept))]})
    TimeTable.measured(anatomy(), SEARCH, path=path, device="cpu")
    assert len(asked) == 2 * count
    assert len(read_json(path)) == 2


def test_a_spoiled_file_is_told_in_three_lines(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    write_json(path, {machine_key(anatomy(), "cpu", torch.float32): [{"batch": 2}]})
    with pytest.raises(RunError, match=r"cannot read the times.*\n.*'context'\n.*delete the file"):
        TimeTable.measured(anatomy(), SEARCH, path=path, device="cpu")
