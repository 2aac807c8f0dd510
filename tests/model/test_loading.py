"""What is in the files is the model that the config describes: found by headers before, and by names after loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from halve.disk.soundness import ADAPTER, GENERATION, INDEX
from halve.errors import CheckpointError
from halve.model.checkpoint import Checkpoint
from halve.preflight import check as preflight
from halve.recipe.schema import Recipe

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model_copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


UP = "model.layers.1.mlp.up_proj.weight"


def quantize(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)


def pack(tensors: Tensors) -> None:
    del tensors[UP]
    tensors["model.layers.1.mlp.up_proj.qweight"] = torch.ones(4, 64, dtype=torch.int32)
    tensors["model.layers.1.mlp.up_proj.scales"] = torch.ones(1, 64)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda tensors: tensors.pop(UP), rf"lacks {UP}\n  why: it would be filled with random"),
        (lambda tensors: tensors.update({"model.extra": torch.ones(2)}), r"has an extra tensor model\.extra\n"),
        (lambda tensors: tensors.update({UP: torch.ones(3, 32)}), rf"has {UP} in shape \(3, 32\)\n  why: .*\(64, 32\)"),
        (quantize, rf"are quantized\n  why: {UP} is F8_E4M3"),
        (pack, r"are quantized\n  why: .*up_proj\.qweight belongs to packed weights"),
    ],
)
def test_misfits_are_found_without_reading_a_weight(
    model_copy: Path, make_recipe: Callable[..., Recipe], change: Callable[[Tensors], Any], what: str
) -> None:
    edit(model_copy, change)
    found = preflight.check(make_recipe(model=str(model_copy)))
    assert len(found) == 1
    with pytest.raises(CheckpointError, match=what):
        raise found[0]


@pytest.mark.parametrize("value", [{"max_new_tokens": 0}, {"watermarking_config": 5}, []])
def test_a_generation_config_that_stops_the_loader_is_found_before(
    model_copy: Path, make_recipe: Callable[..., Recipe], value: Any
) -> None:
    (model_copy / GENERATION).write_text(json.dumps(value))
    (error,) = preflight.check(make_recipe(model=str(model_copy)))
    assert f"{GENERATION} keeps the model from being loaded" in error.what


@pytest.mark.parametrize("text", ["{{", '{"max_length": 20, "temperature": 0.3}'])
def test_a_generation_config_that_the_loader_takes_or_passes_over_is_none_of_ours(model_copy: Path, text: str) -> None:
    (model_copy / GENERATION).write_text(text)
    model = Checkpoint.open(model_copy)
    model.require_weights()
    model.load()


def test_a_head_of_its_own_under_a_tied_config_is_refused(model_copy: Path) -> None:
    def add(tensors: Tensors, shift: float) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + shift

    edit(model_copy, lambda tensors: add(tensors, 0.0))  # some trainers write the same table twice
    Checkpoint.open(model_copy).require_weights()
    edit(model_copy, lambda tensors: add(tensors, 0.01))
    opened = Checkpoint.open(model_copy)
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to .*, and the two differ\n.*\n  fix: set tie"):
        opened.require_weights()
    with pytest.raises(CheckpointError, match=r"loads as another model.*\n  why: lm_head\.weight is a parameter"):
        opened.load()
    configure(model_copy, tie_word_embeddings=False)  # what the error says
    opened = Checkpoint.open(model_copy)
    opened.require_weights()
    assert "lm_head.weight" in dict(opened.load().named_parameters())


@pytest.mark.parametrize("shape", [[10**10, 10**10], [-64, -32], ["64", 32], [64.5, 32], [32, 64, 1, 7]])
def test_shapes_that_cannot_be_are_refused(model_copy: Path, shape: list[Any]) -> None:
    path = model_copy / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[UP]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(CheckpointError, match=r"is not a (sound )?safetensors file\n  why: "):
        Checkpoint.open(model_copy).require_weights()


def test_a_missing_head_says_what_helps(model_copy: Path) -> None:
    configure(model_copy, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight\n.*\n  fix: set tie_word_embeddings to true"):
        Checkpoint.open(model_copy).require_weights()


def test_an_adapter_beside_the_weights_is_refused(model_copy: Path) -> None:
    (model_copy / ADAPTER).write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    opened = Checkpoint.open(model_copy)
    for look in (opened.require_weights, opened.load):
        with pytest.raises(CheckpointError, match=r"holds an adapter beside the weights\n.*\n  fix: merge it"):
            look()


def test_an_index_without_metadata_opens(tiny_llama: Path, model_copy: Path) -> None:
    tensors = load_file(model_copy / "model.safetensors")
    (model_copy / "model.safetensors").rename(model_copy / "model-00001-of-00001.safetensors")
    (model_copy / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")})
    )
    opened = Checkpoint.open(model_copy)
    opened.require_weights()
    ids = torch.arange(24)[None]
    assert torch.equal(opened.load()(ids).logits, Checkpoint.open(tiny_llama).load()(ids).logits)


def test_an_attention_that_is_not_installed_is_not_the_models(tiny_llama: Path, model_copy: Path) -> None:
    configure(model_copy, _attn_implementation="flash_attention_2")
    ids = torch.arange(24)[None]
    assert torch.equal(Checkpoint.open(model_copy).load()(ids).logits, Checkpoint.open(tiny_llama).load()(ids).logits)


def test_gpt2_with_the_buffers_of_old_versions_opens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    model.save_pretrained(tmp_path)
    old = {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    old |= {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    edit(tmp_path, lambda tensors: tensors.update(old))
    opened = Checkpoint.open(tmp_path)
    opened.require_weights()
    ids = torch.arange(24)[None]
    assert torch.equal(opened.load()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3_moe", "gemma2", "phi3"])
def test_names_that_differ_on_disk_are_known(family: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if "moe" in family else {}
    config = AutoConfig.for_model(family, **sizes, **heads, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    opened = Checkpoint.open(tmp_path)
    opened.require_weights()
    opened.load()
    edit(tmp_path, lambda tensors: tensors.pop(max(name for name in tensors if "layers.1" in name)))
    with pytest.raises(CheckpointError, match=" lacks "):
        Checkpoint.open(tmp_path).require_weights()
