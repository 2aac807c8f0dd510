"""A saved config says the same to readers that know the older names of its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from halve.anatomy.configs import resized
from halve.anatomy.spelling import spelled_out
from halve.model.saving import save_model

SIZES = {"vocab_size": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
HIDDEN = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 40}


def saved(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    save_model(AutoModelForCausalLM.from_config(config), folder / "out", extra_from=None, record=None)
    raw: dict[str, Any] = json.loads((folder / "out" / "config.json").read_text())
    return raw


def test_gpt2_has_its_context_under_both_names(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=2, n_layer=1, n_positions=48, **SIZES)
    raw = saved(config, tmp_path)
    assert raw["n_ctx"] == raw["n_positions"] == 48


def test_the_experts_of_a_mixture_are_counted_under_both_names(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 2, "moe_intermediate_size": 16, "head_dim": 16}
    config = AutoConfig.for_model("qwen3_moe", num_experts=3, num_experts_per_tok=2, **HIDDEN, **sizes, **SIZES)
    raw = saved(config, tmp_path)
    assert raw["num_experts"] == raw["num_local_experts"] == 3
    assert AutoConfig.from_pretrained(tmp_path / "out").num_experts == 3


def test_kinds_of_layers_that_repeat_are_those_that_were_kept(tmp_path: Path) -> None:
    kinds = {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 2}
    config = AutoConfig.for_model("gpt_neo", hidden_size=32, intermediate_size=40, **kinds, **SIZES)
    raw = saved(resized(config, {}, kept_layers=[0, 2, 3]), tmp_path)
    assert raw["attention_layers"] == ["global", "global", "local"]
    assert raw["attention_types"] == [[["global", "global", "local"], 1]]
    assert AutoConfig.from_pretrained(tmp_path / "out").attention_layers == raw["attention_layers"]


def test_a_key_that_would_be_read_as_something_else_stays_out() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=1, **HIDDEN, **SIZES)
    raw = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    spelled = spelled_out(config, raw)
    assert spelled["rope_theta"] == raw["rope_parameters"]["rope_theta"]
    assert not {"n_ctx", "num_experts", "attention_types", "rotary_pct"} & {*spelled}
