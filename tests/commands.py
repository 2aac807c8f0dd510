"""What the tests of commands read: a small config, and what a command said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halve.disk.files import file_sha256, sealed, write_json

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 500,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# 64 x 500 outside; a layer: q and o 2 x 64 x 64, k and v 2 x 64 x 32, mlp 3 x 64 x 160, norms 2 x 64; final norm 64
TINY_PARAMS = 64 * 500 + 4 * (8_192 + 4_096 + 30_720 + 128) + 64


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON on stdout; anything else there fails."""
    return json.loads(capsys.readouterr().out)


def finished_stage(folder: Path, metrics: dict[str, Any], **contents: Any) -> None:
    """A stage's folder as a run leaves it: JSON files and the manifest."""
    for name, content in contents.items():
        write_json(folder / f"{name}.json", content)
    files = {path.name: {"sha256": file_sha256(path)} for path in folder.glob("*.json")}
    write_json(folder / "manifest.json", sealed({"metrics": metrics, "files": files}))


def assert_refused(code: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Exit code 2, nothing on stdout, three lines on stderr: what, why, fix."""
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    what, why, fix = (line for line in err.splitlines() if not line.startswith("[transformers]"))
    assert what.startswith("error: ")
    assert why.startswith("  why: ")
    assert fix.startswith("  fix: ")
    for word in words:
        assert word in err
