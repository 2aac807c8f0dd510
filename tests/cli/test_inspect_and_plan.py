"""`halve inspect` and `halve plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import TINY, TINY_PARAMS, assert_refused, said
from transformers import BloomConfig

from halve.cli.app import main


def test_inspect(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--no-proof"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("llama: layers 4, hidden 64, ffn 160, heads 8/4 x 8, vocab 500\n")
    assert "model.layers.0.mlp.down_proj.weight" in out
    assert "model.layers.1." not in out
    assert f"next: halve plan {model}" in err


def test_inspect_as_json_says_what_can_be_cut(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--no-proof", "--json"]) == 0
    found = said(capsys)
    assert found["family"] == "llama"
    assert found["params"] == TINY_PARAMS
    assert found["weights"]["model.layers.3.mlp.down_proj.weight"] == ["hidden", "ffn"]
    assert found["can_be_cut"] == ["layers", "hidden", "ffn", "heads", "kv_heads"]
    assert set(found["refused"]) == {"head_dim", "vocab", "experts", "expert_ffn"}
    assert found["proof"] is None


def test_inspect_proves_by_default(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--json"]) == 0
    checks = said(capsys)["proof"]
    assert checks
    assert all(check["passed"] for check in checks)
    assert {check["axis"] for check in checks} == {"layers", "hidden", "ffn", "heads", "kv_heads"}


def test_plan_by_hand(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--ffn", "80", "--drop-layers", "1-2", "--json"]) == 0
    found = said(capsys)
    (only,) = found["candidates"]
    assert only["arch"]["ffn"] == 80
    assert only["arch"]["layers"] == 2
    assert only["kept_layers"] == [0, 3]
    assert only["counts"]["params"] == 64 * 500 + 2 * (8_192 + 4_096 + 3 * 64 * 80 + 128) + 64
    assert [runtime["name"] for runtime in only["runtimes"]] == ["transformers", "vLLM", "llama.cpp"]


def test_plan_near_a_budget(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), "--params", "120k", "--most", "3", "--json"]) == 0
    candidates = said(capsys)["candidates"]
    assert 1 <= len(candidates) <= 3
    for candidate in candidates:
        assert abs(candidate["counts"]["params"] / 120_000 - 1) <= 0.05
    assert main(["plan", str(model), "--non-embedding-ratio", "0.6"]) == 0
    out, err = capsys.readouterr()
    assert "candidates, best guess first" in out
    assert "next: " in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--heads", "7"], ("7 query heads in 4 key-value groups", "--heads 4 or 8")),
        (["--ffn", "200"], ("200 of 160 ffn",)),
        (["--params", "1k"], ("no valid sizes have about", "nearest:")),
        (["--params", "many"], ("'many'",)),
        (["--drop-layers", "0-3"], ("cannot drop layers 0-3",)),
        (["--params", "100k", "--ffn", "80"], ("these flags make no plan", "exactly one")),
        ([], ("these flags make no plan",)),
    ],
)
def test_plan_refuses(
    flags: list[str], words: tuple[str, ...], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main(["plan", str(model), *flags]), capsys, *words)


def test_plan_lists_what_is_proved_of_a_family_without_a_limit_of_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BloomConfig(vocab_size=100, hidden_size=32, n_head=4, n_layer=4).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--non-embedding-ratio", "0.5", "--json"]) == 0
    assert {one["arch"]["hidden"] for one in said(capsys)["candidates"]} == {32}
    assert_refused(main(["plan", str(tmp_path), "--hidden", "24"]), capsys, "will not cut hidden of bloom")


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_a_model_that_is_not_there(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ffn", "8"] if verb == "plan" else []
    assert_refused(main([verb, str(tmp_path / "none"), *flags]), capsys, "none")


def test_a_family_that_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "lama"}), encoding="utf-8")
    assert_refused(main(["inspect", str(tmp_path)]), capsys, "lama")
