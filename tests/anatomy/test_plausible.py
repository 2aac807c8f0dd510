"""Configs that no decoder-only language model has are refused before anything is built."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from families import config

from halve.anatomy import plausible
from halve.errors import CheckpointError
from halve.model.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 10**12},
            "has num_hidden_layers: 1000000000000\n  why: a model has between 1 and 10,000",
        ),
        ({"model_type": "qwen3", "num_hidden_layers": 10**12}, "has num_hidden_layers: 1000000000000"),
        ({"num_key_value_heads": 10**12}, "has num_key_value_heads: 1000000000000"),
        ({"num_key_value_heads": 0}, "has num_key_value_heads: 0"),
        ({"intermediate_size": 10**12}, "has intermediate_size: 1000000000000"),
        ({"vocab_size": -1}, "has vocab_size: -1"),
        ({"is_encoder_decoder": True}, "has is_encoder_decoder: True\n  why: halve reads decoder-only"),
        ({"rms_norm_eps": 3.7}, r"has rms_norm_eps: 3\.7\n  why: what a norm adds"),
        ({"rms_norm_eps": -1e-6}, "has rms_norm_eps: -1e-06"),
        ({"rms_norm_eps": math.nan}, "has rms_norm_eps: nan"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "has rope_theta: 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, r"has rope_theta: -5\.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": math.inf}}, "has rope_theta: inf"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}}, r"has factor: 0\.0"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -1.0}}, r"has factor: -1\.0"),
        ({"dtype": "int8"}, r"has dtype: torch\.int8\n  why: weights are float16"),
        ({"dtype": "float8_e4m3fn"}, r"has dtype: torch\.float8_e4m3fn"),
        ({"dtype": 5}, "has dtype: 5"),
        ({"text_config": {"hidden_size": 9}}, "has text_config: 'a dict'"),
    ],
)
def test_what_no_model_has_is_named_at_once(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config("llama").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint.open(tmp_path).config
    assert time.process_time() - began < 5


def test_a_window_that_sees_nothing_is_refused() -> None:
    for window in (-3, 0, None):
        sliding = config("qwen3", layer_types=["sliding_attention"] * 6)
        sliding.sliding_window = window
        with pytest.raises(CheckpointError, match=f"has sliding_window: {window}"):
            plausible.require_plausible(sliding, Path("config.json"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere2", "smollm3"])
def test_sound_configs_are_taken(family: str) -> None:
    plausible.require_plausible(config(family), Path("config.json"))
