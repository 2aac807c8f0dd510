"""What comes in is sound, what goes out opens everywhere."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from halve.disk import soundness
from halve.errors import AnatomyError, CheckpointError, DiskError, RecipeError, TokenizerError
from halve.model import checkpoint, saving
from halve.model.card import license_of
from halve.model.checkpoint import Checkpoint

IDS = torch.arange(24)[None]


@pytest.fixture
def model_copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, **changes}))


def edit_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def raw_config(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return raw


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


def test_sources_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="there is no model /no/such/folder"):
        Checkpoint.open("/no/such/folder").load()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "file").load()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path).load()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of own/er in a hub's cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--own--er"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    return repository / "snapshots" / ("a" * 40)


def fail(error: Exception) -> Callable[..., Any]:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error

    return failing


PARTIAL = (
    r"^the download of own/er is incomplete\n  why: only a part of it is in the hub's cache here, and %s"
    r"\n  fix: run this once with a network and without HF_HUB_OFFLINE, or: hf download own/er$"
)


def test_a_download_that_is_not_all_there_is_told_as_such(
    tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PARTIAL % "HF_HUB_OFFLINE forbids to ask the hub"
    with pytest.raises(CheckpointError, match=partial):
        assert Checkpoint.open("own/er").config
    shutil.copy(tiny_llama / "config.json", cache)
    opened = Checkpoint.open("own/er")
    assert opened.config.hidden_size == 32
    for needs in (opened.require_weights, opened.require_tokenizer):
        with pytest.raises(CheckpointError, match=partial):
            needs()
    index = {"weight_map": {"nothing": "model-1.safetensors"}}
    (cache / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=partial):
        opened.require_weights()
    monkeypatch.setattr(soundness, "snapshot_download", fail(ConnectionError("Got: no way\nmore")))
    with pytest.raises(CheckpointError, match=PARTIAL % "the hub cannot be reached: Got: no way"):
        Checkpoint("own/er", cache).require_weights()


WHOLE = PARTIAL % "the download did not end"


@pytest.mark.parametrize(
    ("listed", "no_weights", "no_tokenizer", "no_config"),
    [
        (["config.json", "model.safetensors", "tokenizer.json"], WHOLE, WHOLE, WHOLE),
        (
            ["pytorch_model.bin"],
            r"own/er has no safetensors weights\n  why: .*pickle.*\n  fix: .* convert it",
            r"own/er has no tokenizer\n  why: .* is in its repository\n  fix: hf download own/er",
            r"own/er has no config\.json\n  why: its repository has none",
        ),
    ],
)
def test_what_a_repository_lacks_is_told_from_half_a_download(
    tiny_llama: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    listed: list[str],
    no_weights: str,
    no_tokenizer: str,
    no_config: str,
) -> None:
    files = [SimpleNamespace(rfilename=name) for name in listed]
    monkeypatch.setattr(soundness, "snapshot_download", lambda *args, **keys: str(cache))
    monkeypatch.setattr(soundness.HfApi, "model_info", lambda api, name: SimpleNamespace(siblings=files))
    with pytest.raises(CheckpointError, match=no_config):
        assert Checkpoint.open("own/er").config
    shutil.copy(tiny_llama / "config.json", cache)
    opened = Checkpoint.open("own/er")
    with pytest.raises(CheckpointError, match=no_weights):
        opened.require_weights()
    with pytest.raises(CheckpointError, match=no_tokenizer):
        opened.require_tokenizer()


def status(number: int) -> Exception:
    answer = SimpleNamespace(status_code=number, headers={}, request=None)
    return soundness.errors.HfHubHTTPError(f"{number} for url", response=answer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "why", "fix"),
    [
        (None, "the hub's cache has none, and HF_HUB_OFFLINE forbids", "check the spelling; .*hf download ow/ner"),
        (ConnectionError("no way\nmore"), "has none, and the hub cannot be reached: no way$", "check the spelling"),
        (RuntimeError("a proxy's"), "the hub cannot be reached: a proxy's$", "check the spelling"),
        (status(401), "the hub does not show such a model without permission", "for a private or gated model"),
        (status(503), "the hub cannot be reached: 503 for url", "check the spelling"),
    ],
)
def test_names_that_the_hub_does_not_give(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, why: str, fix: str
) -> None:
    if error is not None:
        monkeypatch.setattr(soundness, "snapshot_download", fail(error))
    with pytest.raises(
        CheckpointError, match=r"^cannot get model ow/ner( from the hub)?\n  why: there is no such folder"
    ) as caught:
        Checkpoint.open("ow/ner")
    assert re.search(why, caught.value.why)
    assert re.search(fix, caught.value.fix)


def test_a_hub_name_asks_for_safetensors_and_json_alone(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **patterns: Any) -> str:
        asked.append({"name": name, **patterns})
        return str(tiny_llama)

    monkeypatch.setattr(soundness, "snapshot_download", download)
    assert Checkpoint.open("own/er").config.model_type == "llama"
    Checkpoint.open("own/er").load()
    assert asked[0]["allow_patterns"] == ["config.json"]
    wanted = ["config.json", "model-1.safetensors", "tokenizer.model", "LICENSE", "README.md", "tekken.json"]
    others = [
        "pytorch_model.bin",
        "modeling.py",
        "LICENSE.py",
        "consolidated.safetensors",
        "original/params.json",
        "a/b.txt",
    ]
    assert filtered([*wanted, *others, CHAT], asked[-1]) == [*wanted, CHAT]


CHAT = "additional_chat_templates/tool_use.jinja"


def filtered(names: list[str], asked: dict[str, Any]) -> list[str]:
    """What the hub's client takes of a repository."""
    allowed, ignored = asked["allow_patterns"], asked["ignore_patterns"]
    return list(filter_repo_objects(names, allow_patterns=allowed, ignore_patterns=ignored))


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


# --- saving


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


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checkpoint.resolve_device("auto") == checkpoint.resolve_device("cpu") == "cpu"
    with pytest.raises(RecipeError, match="device cuda is not there"):
        checkpoint.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checkpoint.resolve_device("auto") == checkpoint.resolve_device("cuda") == "cuda"


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
