"""What comes in is sound, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import IDS, edit_config, edit_weights
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedTokenizerFast,
)

from halve.disk import soundness
from halve.errors import AnatomyError, CheckpointError, RecipeError, TokenizerError
from halve.model import checkpoint
from halve.model.checkpoint import Checkpoint

# --- loading


def test_loading_gives_the_same_model_as_transformers(tiny_llama: Path) -> None:
    ours, theirs = Checkpoint.open(tiny_llama).load(), AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert not ours.training
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_weights_keep_their_own_precision_unless_told(model_copy: Path) -> None:
    edit_weights(model_copy, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    edit_config(model_copy, dtype="bfloat16")
    assert Checkpoint.open(model_copy).load().dtype == torch.bfloat16
    assert Checkpoint.open(model_copy).load(dtype="float32").dtype == torch.float32


def test_a_config_alone_is_enough_for_load_config(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    assert Checkpoint.open(tmp_path).config.hidden_size == 32
    with pytest.raises(CheckpointError, match=r"has no weights\n  why: neither model\.safetensors nor"):
        Checkpoint.open(tmp_path).load()


def test_shards_load_and_every_one_is_checked(tiny_llama: Path, tmp_path: Path) -> None:
    model = Checkpoint.open(tiny_llama).load()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(Checkpoint.open(tmp_path).load()(IDS).logits, model(IDS).logits)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-3])
    with pytest.raises(CheckpointError, match=rf"{last.name} is truncated\n  why: it has \d+ bytes and its header"):
        Checkpoint.open(tmp_path).load()
    last.unlink()
    with pytest.raises(CheckpointError, match=rf"{last.name} is missing"):
        Checkpoint.open(tmp_path).load()


def test_headers_say_what_the_weights_are(tiny_llama: Path) -> None:
    headers = soundness.read_headers(tiny_llama)
    tensors = load_file(tiny_llama / "model.safetensors")
    assert {name: header.shape for name, header in headers.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("keep_bytes", [0, 5, 8, 200])
def test_a_file_without_its_header_is_refused(model_copy: Path, keep_bytes: int) -> None:
    path = model_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        Checkpoint.open(model_copy).load()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-32]},
        {"shape": [10**10, 10**10]},
        {"shape": [32.0]},
        {"shape": "32"},
        {"shape": [33]},
        {"dtype": "bogus"},
        {"dtype": 5},
        {"data_offsets": [-4, 124]},
        {"data_offsets": [128, 0]},
    ],
)
def test_headers_that_say_what_cannot_be_are_refused(model_copy: Path, change: dict[str, Any]) -> None:
    path = model_copy / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (not a safetensors file|too long)"):
        soundness.read_headers(model_copy)


def test_a_header_that_is_not_json_is_refused(model_copy: Path) -> None:
    (model_copy / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"abcd")
    with pytest.raises(CheckpointError, match="is not a safetensors file\n  why: its header cannot be read"):
        Checkpoint.open(model_copy).load()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt", "model.pth"])
def test_pickles_are_refused_unopened(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=f"{name} is a pickle checkpoint.*\n.*only safetensors are read"):
        Checkpoint.open(tmp_path).load()


def test_an_index_cannot_point_outside_or_at_a_pickle(model_copy: Path) -> None:
    (model_copy / "model.safetensors").rename(model_copy / "a.safetensors")
    for name in ("../a.safetensors", "weights.bin"):
        index = {"weight_map": {"model.norm.weight": name}}
        (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=f"names {name}"):
            Checkpoint.open(model_copy).load()
    index = {"weight_map": {"nothing": "a.safetensors"}}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks nothing"):
        Checkpoint.open(model_copy).load()


def test_a_missing_tensor_is_not_made_up(model_copy: Path) -> None:
    edit_weights(model_copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight\n  why: it would be"):
        Checkpoint.open(model_copy).load()


def test_an_extra_tensor_is_not_lost(model_copy: Path) -> None:
    edit_weights(model_copy, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.ones(64)}))
    with pytest.raises(CheckpointError, match=r"extra tensor model\.layers\.0\.mlp\.up_proj\.bias"):
        Checkpoint.open(model_copy).load()


def test_a_wrong_shape_is_named_with_both_shapes(model_copy: Path) -> None:
    edit_config(model_copy, intermediate_size=72)
    with pytest.raises(
        CheckpointError, match=r"in shape \(32, 64\)\n  why: by its config.json the shape is \(32, 72\)"
    ):
        Checkpoint.open(model_copy).load()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(model_copy: Path, value: float) -> None:
    edit_weights(model_copy, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"][3].fill_(value))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.down_proj\.weight of .* is not finite"):
        Checkpoint.open(model_copy).load()


@pytest.mark.parametrize("which", ["", "embed_tokens", "proj"])
def test_weights_that_are_all_zero_are_refused(model_copy: Path, which: str) -> None:
    def clear(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if which in name or (which == "proj" and "embed" in name):
                tensor.zero_()

    edit_weights(model_copy, clear)
    with pytest.raises(CheckpointError, match="are all zero"):
        Checkpoint.open(model_copy).load()


def test_one_matrix_of_zeros_is_a_model(model_copy: Path) -> None:
    edit_weights(model_copy, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].zero_())
    Checkpoint.open(model_copy).load()


# --- configs


def test_an_unknown_model_type_is_named(model_copy: Path) -> None:
    edit_config(model_copy, model_type="frobnicator")
    with pytest.raises(CheckpointError, match="unknown model_type 'frobnicator'"):
        assert Checkpoint.open(model_copy).config


def test_code_in_a_checkpoint_never_runs(model_copy: Path) -> None:
    trap, code = model_copy / "ran", "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"
    (model_copy / "modeling_evil.py").write_text(code)
    (model_copy / "configuration_evil.py").write_text(code)
    auto = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit_config(model_copy, auto_map=auto)
    Checkpoint.open(model_copy).load()  # a known type: its own class is used
    edit_config(model_copy, model_type="evil")
    with pytest.raises(CheckpointError, match="the code it brings is never run"):
        Checkpoint.open(model_copy).load()
    assert not trap.exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"attn_implementation": "someone/kernel"}, "asks for attn_implementation someone/kernel"),
        ({"quantization_config": {"quant_method": "awq"}}, "is of a quantized model"),
        ({"transformers_weights": "other.safetensors"}, "redirects to weights in other.safetensors"),
        ({"model_type": None}, "names no model_type"),
        ({"num_attention_heads": "four"}, "is not a valid llama config"),
    ],
)
def test_configs_that_would_load_wrongly(model_copy: Path, changes: dict[str, Any], what: str) -> None:
    edit_config(model_copy, **changes)
    with pytest.raises(CheckpointError, match=what):
        assert Checkpoint.open(model_copy).config


def test_a_broken_config_is_an_error(model_copy: Path) -> None:
    (model_copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        assert Checkpoint.open(model_copy).config


@pytest.mark.parametrize("kind", ["clip", "t5", "florence2", "grounding-dino"])
def test_what_is_no_decoder_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(
        CheckpointError, match=r"is not a causal language model\n.*\n  fix: give a decoder-only language"
    ):
        assert Checkpoint.open(tmp_path).config


@pytest.mark.parametrize(
    ("kind", "part", "beside"),
    [
        ("mistral3", "mistral", "vision_config"),
        ("smolvlm", "llama", "vision_config"),
        ("llava", "llama", "vision_config"),
        ("internvl", "qwen2", "vision_config"),
        ("voxtral", "llama", "audio_config"),
        ("audioflamingo3", "qwen2", "audio_config"),
    ],
)
def test_a_wrapper_is_told_how_its_language_model_is_taken_out(
    tmp_path: Path, kind: str, part: str, beside: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    message = (
        f"{kind} wraps a language model .*\n  why: .* one \\({part}\\) beside {beside}.*\n  fix: save the {part} to"
    )
    with pytest.raises(AnatomyError, match=message):
        assert Checkpoint.open(tmp_path).config


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_a_wrapper_whose_language_model_has_no_class_of_its_own_says_so(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    message = (
        f"{kind} wraps a language model .*\n  why: .* one \\({kind}_text\\).* has no causal .*\n  fix: give a text-only"
    )
    with pytest.raises(AnatomyError, match=message):
        assert Checkpoint.open(tmp_path).config


@pytest.mark.parametrize("kind", ["llava", "voxtral"])
def test_the_lines_of_the_guide_take_the_language_model_out(tmp_path: Path, kind: str) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, **small}
    other = {
        "llava": {"vision_config": {"model_type": "clip_vision_model", **small}},
        "voxtral": {"audio_config": small},
    }
    whole = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind, text_config=text, **other[kind])).eval()
    whole.save_pretrained(tmp_path / "whole")
    guide = (Path(__file__).parents[2] / "docs/guides/first-model.md").read_text(encoding="utf-8")
    (code,) = (block.split("```")[0] for block in guide.split("```python\n") if "MultimodalLM" in block)
    exec(code.replace('"MODEL"', repr(str(tmp_path / "whole"))).replace('"TEXT_MODEL"', repr(str(tmp_path / "text"))))
    assert torch.equal(Checkpoint.open(tmp_path / "text").load()(IDS).logits, whole(input_ids=IDS).logits)


# --- tokenizers


def test_tokenizers(tiny_llama: Path, model_copy: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert Checkpoint.open(tiny_llama).tokenizer("the cat").input_ids == tokenizer("the cat").input_ids
    (model_copy / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot load the tokenizer"):
        assert Checkpoint.open(model_copy).tokenizer
    (model_copy / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        assert Checkpoint.open(model_copy).tokenizer


def test_a_tokenizer_with_more_ids_than_the_model_is_not_its_own(tiny_llama: Path, model_copy: Path) -> None:
    Checkpoint.open(tiny_llama).require_tokenizer()
    edit_config(model_copy, vocab_size=319)
    with pytest.raises(TokenizerError, match="is not the model's\n  why: its largest id is 319"):
        Checkpoint.open(model_copy).require_tokenizer()


def test_a_tokenizer_that_cannot_read_text_is_refused(model_copy: Path) -> None:
    raw = json.loads((model_copy / "tokenizer.json").read_text())
    raw["model"] |= {"unk_token": "<unk>", "vocab": {"a": 0}, "merges": []}
    raw["added_tokens"] = []
    (model_copy / "tokenizer.json").write_text(json.dumps(raw))
    (model_copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(TokenizerError, match=r"cannot (read text|load the tokenizer)"):
        Checkpoint.open(model_copy).require_tokenizer()


def test_an_id_that_is_another_when_it_is_loaded_is_refused(model_copy: Path) -> None:
    path = model_copy / "tokenizer.json"
    raw = json.loads(path.read_text())
    free = len(Checkpoint.open(model_copy).tokenizer)
    edit_config(model_copy, vocab_size=free)
    for number, fits in ((free, True), (9999, False)):
        pad = {"id": number, "content": "[PAD]", "special": True, "normalized": False}
        pad |= {"single_word": False, "lstrip": False, "rstrip": False}
        path.write_text(json.dumps({**raw, "added_tokens": [*raw["added_tokens"], pad]}))
        opened = Checkpoint.open(model_copy)
        if fits:
            opened.require_tokenizer()
            continue
        with pytest.raises(TokenizerError, match=rf"gives \[PAD\] the id 9999\n  why: it is loaded as {free}"):
            opened.require_tokenizer()


def test_what_a_tokenizer_says_of_lengths_has_no_say(model_copy: Path) -> None:
    raw = json.loads((model_copy / "tokenizer_config.json").read_text())
    (model_copy / "tokenizer_config.json").write_text(json.dumps({**raw, "model_max_length": "x"}))
    assert Checkpoint.open(model_copy).tokenizer("the cat " * 100).input_ids


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checkpoint.resolve_device("auto") == checkpoint.resolve_device("cpu") == "cpu"
    with pytest.raises(RecipeError, match="device cuda is not there"):
        checkpoint.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checkpoint.resolve_device("auto") == checkpoint.resolve_device("cuda") == "cuda"
