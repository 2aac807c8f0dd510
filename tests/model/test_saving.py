"""What goes out opens everywhere, and is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from folders import CHAT, IDS, edit_config, raw_config
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from halve.errors import CheckpointError, DiskError
from halve.model import saving
from halve.model.card import license_of
from halve.model.checkpoint import Checkpoint

TERMS = ("LICENSE", "License-Gemma.txt", "NOTICE", "USE_POLICY.md", "tekken.json", "sentencepiece.bpe.model", CHAT)


def test_terms_of_use_and_every_template_go_with_the_model(model_copy: Path, tmp_path: Path) -> None:
    (model_copy / CHAT).parent.mkdir()
    for name in (*TERMS, "LICENSE.py", "notes.txt", f"{CHAT}.bak"):
        (model_copy / name).write_text(name)
    card = "---\nlicense: other\nlicense: [broken\nlicense_name: llama3.1\nlicense_link: LICENSE\n---\nlicense: mit\n"
    (model_copy / "README.md").write_text(card)
    made = model_copy
    for name in ("pruned", "distilled"):  # one student from the other
        saving.save_model(Checkpoint.open(made).load(), tmp_path / name, extra_from=made, record={"stage": "prune"})
        made = tmp_path / name
    assert all((made / name).read_text() == name for name in TERMS)
    assert not any((made / name).exists() for name in ("LICENSE.py", "notes.txt", f"{CHAT}.bak"))
    front = yaml.safe_load((made / "README.md").read_text().split("---\n")[1])
    assert {key: front[key] for key in front if key.startswith("license")} == {
        "license": "other",
        "license_name": "llama3.1",
        "license_link": "LICENSE",
    }


def test_code_that_does_not_go_with_a_student_is_not_named_in_it(model_copy: Path, tmp_path: Path) -> None:
    changed = ("tokenizer_config.json", "generation_config.json")
    before = {name: json.loads((model_copy / name).read_text()) for name in changed}
    for name in ("config.json", *changed):
        raw = json.loads((model_copy / name).read_text())
        (model_copy / name).write_text(json.dumps({**raw, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}))
    (model_copy / "special_tokens_map.json").write_text('{"own":   "auto_map"}')
    out = tmp_path / "out"
    saving.save_model(Checkpoint.open(model_copy).load(), out, extra_from=model_copy, record=None)
    assert "auto_map" not in raw_config(out)
    assert {name: json.loads((out / name).read_text()) for name in changed} == before
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (model_copy / name).read_bytes()
    ours = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert torch.equal(ours(IDS).logits, Checkpoint.open(model_copy).load()(IDS).logits)
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True)("the cat").input_ids


@pytest.mark.parametrize(
    "text", ["", "no front", "---\n", "---\nlicense: 5\n---\n", "---\nlicense:\n", "\udcff---\nlicense: mit"]
)
def test_a_card_without_a_license_names_none(model_copy: Path, tmp_path: Path, text: str) -> None:
    (model_copy / "README.md").write_text(text, errors="surrogateescape")
    assert license_of(model_copy) == {}


def test_a_saved_model_reopens_in_a_fresh_process(tiny_llama: Path, tmp_path: Path) -> None:
    model = Checkpoint.open(tiny_llama).load()
    saving.save_model(model, tmp_path / "out", extra_from=tiny_llama, record={"made": "here"})
    torch.save(model(IDS).logits, tmp_path / "logits")
    code = (
        "import sys, torch, transformers as t; folder, logits = sys.argv[1:];"
        "model = t.AutoModelForCausalLM.from_pretrained(folder);"
        "torch.set_num_threads(1);"
        "assert torch.equal(model(torch.arange(24)[None]).logits, torch.load(logits));"
        "assert t.AutoTokenizer.from_pretrained(folder).chat_template;"
        "assert t.GenerationConfig.from_pretrained(folder).max_new_tokens == 17"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "out", tmp_path / "logits"], check=True)
    assert json.loads((tmp_path / "out" / "halve.json").read_text()) == {"made": "here"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# fmt: off
FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "nemotron", "olmo",
    "olmo2", "granite", "smollm3", "starcoder2", "gpt_neox", "gpt2", "stablelm", "cohere2", "glm4",
]
# fmt: on


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_back_what_was_written(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4}
    else:
        sizes |= {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        sizes |= {"num_key_value_heads": 2}
    config = AutoConfig.for_model(family, **sizes)
    before = config.to_dict()
    model = AutoModelForCausalLM.from_config(config).eval()
    saving.save_model(model, tmp_path / "out", extra_from=None, record=None)
    assert model.config.to_dict() == before
    reopened = Checkpoint.open(tmp_path / "out").load()
    assert torch.equal(reopened(IDS).logits, model(IDS).logits)
    raw = raw_config(tmp_path / "out")
    assert raw["dtype"] == raw["torch_dtype"] == "float32"
    if family != "gpt2":
        rope = raw["rope_parameters"].get("full_attention", raw["rope_parameters"])
        assert raw["rope_theta"] == rope["rope_theta"]
        assert raw["rope_scaling"] is None
    reads_head_dim = family not in ("gpt2", "gpt_neox", "stablelm")
    assert ("head_dim" in raw) == reads_head_dim


def test_rope_scaling_survives_in_both_spellings(tiny_llama: Path, tmp_path: Path) -> None:
    config = Checkpoint.open(tiny_llama).config
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config.rope_parameters = {"rope_theta": 500000.0, **scaling}
    model = AutoModelForCausalLM.from_config(config).eval()
    saving.save_model(model, tmp_path / "out", extra_from=None, record=None)
    raw = raw_config(tmp_path / "out")
    assert raw["rope_theta"] == 500000.0
    assert raw["rope_scaling"] == scaling
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == config.rope_parameters
    assert torch.equal(Checkpoint.open(tmp_path / "out").load()(IDS).logits, model(IDS).logits)


def test_gpt_neox_keeps_its_oldest_rope_names(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gpt_neox", vocab_size=64, rotary_pct=0.5, rotary_emb_base=777.0, **sizes)
    saving.save_model(AutoModelForCausalLM.from_config(config), tmp_path / "out", extra_from=None, record=None)
    raw = raw_config(tmp_path / "out")
    assert (raw["rotary_pct"], raw["rotary_emb_base"]) == (0.5, 777.0)
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 777.0


def test_a_config_keeps_a_string_that_utf_8_cannot_hold(model_copy: Path, tmp_path: Path) -> None:
    raw = json.loads((model_copy / "config.json").read_text()) | {"note": "half of a pair: \ud800"}
    (model_copy / "config.json").write_text(json.dumps(raw))
    saving.save_model(Checkpoint.open(model_copy).load(), tmp_path / "out", extra_from=model_copy, record=None)
    assert raw_config(tmp_path / "out")["note"] == raw["note"]


def test_a_decoupled_head_dim_is_written_and_read(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("qwen2", vocab_size=64, num_key_value_heads=2, **sizes)
    config.head_dim = 8
    model = AutoModelForCausalLM.from_config(config).eval()
    saving.save_model(model, tmp_path / "out", extra_from=None, record=None)
    assert raw_config(tmp_path / "out")["head_dim"] == 8
    assert torch.equal(Checkpoint.open(tmp_path / "out").load()(IDS).logits, model(IDS).logits)


def test_saving_replaces_a_model_and_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    model = Checkpoint.open(tiny_llama).load()
    out = tmp_path / "out"
    saving.save_model(model, out, extra_from=tiny_llama, record=None)
    first = Checkpoint.open(out).fingerprint
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    saving.save_model(model, out, extra_from=out, record=None)
    assert Checkpoint.open(out).fingerprint != first
    assert AutoTokenizer.from_pretrained(out) is not None
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "today.txt").touch()
    with pytest.raises(CheckpointError, match="diary is in the way"):
        saving.save_model(model, tmp_path / "diary", extra_from=None, record=None)
    assert (tmp_path / "diary" / "today.txt").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_model_is_saved_where_one_stands(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    model = Checkpoint.open(tiny_llama).load()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if there:
        saving.save_model(model, tmp_path / "here", extra_from=None, record={"first": 1})
    saving.save_model(model, ".", extra_from=tiny_llama, record=None)
    assert sorted(os.listdir(".")) == sorted(os.listdir(tmp_path / "here"))
    assert (Path("model.safetensors").is_file(), Path("halve.json").exists()) == (True, False)
    saving.save_model(model, "below/..", extra_from=None, record=None)
    assert not Path("tokenizer.json").exists()
    assert os.listdir(tmp_path) == ["here"]


def test_saving_is_the_same_bytes_every_time(tiny_llama: Path, tmp_path: Path) -> None:
    model = Checkpoint.open(tiny_llama).load()
    for name in ("a", "b"):
        saving.save_model(model, tmp_path / name, extra_from=tiny_llama, record=None)
    assert Checkpoint.open(tmp_path / "a").fingerprint == Checkpoint.open(tmp_path / "b").fingerprint


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("moment", ["weights", "config", "fsync", "rename"])
def test_a_full_disk_leaves_nothing_half_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    model = Checkpoint.open(tiny_llama).load()
    saving.save_model(model, tmp_path / "out", extra_from=tiny_llama, record=None)
    before = Checkpoint.open(tmp_path / "out").fingerprint
    target, name = {
        "weights": (type(model), "save_pretrained"),
        "config": (Path, "write_text"),
        "fsync": (os, "fsync"),
        "rename": (os, "replace"),
    }[moment]
    monkeypatch.setattr(target, name, full)
    with pytest.raises(DiskError, match=r"no room left while writing .*new"):
        saving.save_model(model, tmp_path / "new", extra_from=tiny_llama, record={})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Checkpoint.open(tmp_path / "out").fingerprint == before


def test_safetensors_own_message_of_a_full_disk_is_understood(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors wraps the system's error in a type of its own; the text is the one its Rust code prints."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    model = Checkpoint.open(tiny_llama).load()
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(DiskError, match="No space left"):
        saving.save_model(model, tmp_path / "new", extra_from=None, record=None)


# --- the rest


def test_fingerprints_follow_weights_and_config_alone(tiny_llama: Path, model_copy: Path) -> None:
    assert Checkpoint.open(model_copy).fingerprint == Checkpoint.open(tiny_llama).fingerprint
    (model_copy / "README.md").touch()
    assert Checkpoint.open(model_copy).fingerprint == Checkpoint.open(tiny_llama).fingerprint
    edit_config(model_copy, rms_norm_eps=1e-5)
    assert Checkpoint.open(model_copy).fingerprint != Checkpoint.open(tiny_llama).fingerprint


def test_files_that_a_model_is_not_loaded_from_are_none_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    Checkpoint.open(tiny_llama).load().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    for folder in (tmp_path / "model", Path(shutil.copytree(tiny_llama, tmp_path / "single"))):
        before = Checkpoint.open(folder).fingerprint
        every = hashlib.sha256()
        for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
            every.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        assert before == every.hexdigest()  # as runs that are there have it
        (folder / "consolidated.safetensors").write_bytes(b"in another layout")
        opened = Checkpoint.open(folder)
        assert opened.fingerprint == before
        assert opened.load()(IDS).logits.shape == (1, 24, 320)
        assert sum(path.stat().st_size for path in opened.weights) == sum(
            path.stat().st_size for path in folder.glob("model*.safetensors")
        )
    (tmp_path / "single" / "model.safetensors.index.json").write_text("{}")  # passed over, as transformers does
    assert Checkpoint.open(tmp_path / "single").fingerprint == before
