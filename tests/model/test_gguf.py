"""A GGUF file is the model that it was written from, within its rounding, or an error that says why not."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf_files as files
import numpy as np
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from halve.anatomy.quirks import GGUF_WHOLE_WORDS
from halve.cli import app as cli
from halve.disk.gguf_header import is_gguf, read_header
from halve.errors import CheckpointError, HalveError
from halve.model.card import license_of
from halve.model.checkpoint import Checkpoint
from halve.model.gguf import weights
from halve.pipeline.keys import content
from halve.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
Write = Callable[..., Path]
IDS = torch.arange(24)[None]
TEXTS = (
    "The old cat sees a small dog.",
    "It is 1234, isn't it?\n\n  Yes: na\u00efve \u6f22\u5b57 \U0001f600 <|endoftext|> more",
)


@pytest.fixture(scope="module")
def original(tiny_llama: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    assert isinstance(model, LlamaForCausalLM)
    return model.eval()


@pytest.fixture(scope="module")
def words(tiny_llama: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.fixture
def write(original: LlamaForCausalLM, words: PreTrainedTokenizerFast, tmp_path: Path) -> Write:
    """`write(kind=..., changed=..., tensors=...)`: the tiny llama as a GGUF file."""

    def written(name: str = "tiny.gguf", **how: Any) -> Path:
        return files.write_gguf(original, tmp_path / name, tokenizer=words, **how)

    return written


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, torch.Tensor)
    return found


def rounded(model: PreTrainedModel, kind: GGMLQuantizationType) -> dict[str, torch.Tensor]:
    """The model's weights after their way through a file, worked out without one."""
    found = {}
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if array.ndim > 1:
            array = gguf_quants.dequantize(gguf_quants.quantize(array, kind), kind)
        found[name] = torch.from_numpy(array.astype(np.float32)).bfloat16()
    return found


# ---- the model


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_the_model_is_the_original_within_the_rounding(kind: str, write: Write, original: LlamaForCausalLM) -> None:
    number = GGMLQuantizationType[kind]
    model = Checkpoint.open(write(kind=number)).load()
    wanted = rounded(original, number)
    assert model.dtype == torch.bfloat16
    assert model.state_dict().keys() == wanted.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    bound = {"Q4_0": 0.6, "Q8_0": 0.05}.get(kind, 0.03)
    exact = logits(original)
    assert (logits(model.float()) - exact).std() < bound * exact.std()


def test_rows_that_were_not_put_in_pairs_would_be_another_model(write: Write, original: LlamaForCausalLM) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = original.get_parameter(name).detach().numpy()
    model = Checkpoint.open(write(tensors={"blk.0.attn_q.weight": plain})).load()
    assert not torch.equal(model.get_parameter(name), original.get_parameter(name).bfloat16())


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": False},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "phi3": {"tie_word_embeddings": False, "pad_token_id": None},
    "starcoder2": {"tie_word_embeddings": True, "sliding_window": None},
    "gemma2": {"head_dim": 256, "num_hidden_layers": 2},
    "gemma3_text": {"head_dim": 256, "num_hidden_layers": 7, "sliding_window": 16},
}
ARCHITECTURES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}


def twin(family: str, **changes: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64}
    config = AutoConfig.for_model(family, **{**sizes, **heads, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for value in model.parameters():
            noise = 0.2 * torch.randn_like(value) if value.ndim == 1 else 0  # or norms and biases would be all the same
            value.copy_((value + noise).bfloat16())
    assert isinstance(model, PreTrainedModel)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_known_architecture_is_read_as_it_was_written(family: str, tmp_path: Path) -> None:
    model = twin(family)
    architecture = ARCHITECTURES.get(family, family)
    path = files.write_gguf(model, tmp_path / "twin.gguf", architecture=architecture)
    opened = Checkpoint.open(path)
    opened.require_weights()
    read = weights.dequantized(read_header(path), opened.config)
    for name, value in read.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].bfloat16()), name
    # the config is checked by what it computes: the same weights under both
    same = AutoModelForCausalLM.from_config(opened.config, dtype=torch.float32)
    same.load_state_dict(model.state_dict())
    assert torch.equal(logits(same.eval()), logits(model))


def test_positions_that_are_stretched_by_parts_stay_so(tmp_path: Path) -> None:
    published = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 8192, **published}
    model = twin("llama", head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    plain = 500000.0 ** -(np.arange(32) / 32)
    divisors = (plain / model.model.rotary_emb.inv_freq.double().numpy()).astype(np.float32)
    path = files.write_gguf(model, tmp_path / "twin.gguf", tensors={"rope_freqs.weight": divisors})
    opened = Checkpoint.open(path)
    opened.require_weights()
    assert opened.config.rope_parameters == rope
    even = files.write_gguf(model, tmp_path / "even.gguf", tensors={"rope_freqs.weight": np.ones(32, np.float32)})
    assert Checkpoint.open(even).config.rope_parameters["rope_type"] == "default"
    odd = files.write_gguf(model, tmp_path / "odd.gguf", tensors={"rope_freqs.weight": divisors**0.5})
    with pytest.raises(CheckpointError, match="stretches positions in an unknown way"):
        _ = Checkpoint.open(odd).config


def test_positions_that_are_stretched_evenly_stay_so(tmp_path: Path) -> None:
    changed = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    path = files.write_gguf(twin("gemma3_text"), tmp_path / "twin.gguf", architecture="gemma3", changed=changed)
    rope = Checkpoint.open(path).config.rope_parameters
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
    assert rope["sliding_attention"]["rope_type"] == "default"


def test_what_a_file_does_not_say_is_what_llama_cpp_takes(write: Write) -> None:
    changed = {f"llama.{name}": None for name in ("rope.freq_base", "attention.key_length", "attention.value_length")}
    config = Checkpoint.open(write(changed=changed)).config
    assert config.head_dim == 8
    assert config.rope_parameters["rope_theta"] == 10000.0


def test_heads_without_groups_are_put_back_in_order(tmp_path: Path) -> None:
    model = twin("llama", num_key_value_heads=4)
    path = files.write_gguf(model, tmp_path / "twin.gguf", changed={"llama.attention.head_count_kv": None})
    read = weights.dequantized(read_header(path), Checkpoint.open(path).config)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(read.get_parameter(name), model.get_parameter(name).bfloat16())


# ---- the tokenizer


def test_the_tokenizer_makes_the_same_of_text(write: Write, words: PreTrainedTokenizerFast) -> None:
    opened = Checkpoint.open(write())
    opened.require_tokenizer()
    kept = AutoTokenizer.from_pretrained(opened.files)
    for text in TEXTS:
        wanted = words(text)["input_ids"]
        assert opened.tokenizer(text)["input_ids"] == kept(text)["input_ids"] == wanted
        assert kept.decode(wanted) == words.decode(wanted)
    assert kept.chat_template == words.chat_template
    assert (kept.bos_token, kept.eos_token) == (words.bos_token, words.eos_token)


def test_digits_stay_apart_where_the_file_says_so(write: Write, words: PreTrainedTokenizerFast) -> None:
    number = "the year 2024 and 2025"
    plain = Checkpoint.open(write()).tokenizer
    apart = Checkpoint.open(write("apart.gguf", changed={"tokenizer.ggml.pre": "smollm"})).tokenizer
    pieces = [piece for piece, _ in apart.backend_tokenizer.pre_tokenizer.pre_tokenize_str(number)]
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == list("20242025")
    assert "\u01202024" in [piece for piece, _ in plain.backend_tokenizer.pre_tokenizer.pre_tokenize_str(number)]


def test_whole_words_are_taken_before_merges(write: Write) -> None:
    whole = Checkpoint.open(write(changed={"tokenizer.ggml.pre": "llama-bpe"})).tokenizer
    assert whole.backend_tokenizer.model.ignore_merges
    assert not Checkpoint.open(write("plain.gguf")).tokenizer.backend_tokenizer.model.ignore_merges


@pytest.mark.parametrize("split", GGUF_WHOLE_WORDS)
def test_bos_is_put_in_front_where_llama_cpp_does(split: str, write: Write) -> None:
    changed = {"tokenizer.ggml.pre": split, "tokenizer.ggml.add_bos_token": None}
    opened = Checkpoint.open(write(changed=changed))
    for tokenizer in (opened.tokenizer, AutoTokenizer.from_pretrained(opened.files)):
        ids = tokenizer(TEXTS[0])["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1:] == tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("split", "said", "bos"), [("llama-bpe", False, False), ("llama-bpe", True, True), ("gpt-2", None, False)]
)
def test_a_file_that_says_whether_it_wants_bos_is_heard(split: str, said: bool | None, bos: bool, write: Write) -> None:
    changed = {"tokenizer.ggml.pre": split, "tokenizer.ggml.add_bos_token": said}
    tokenizer = Checkpoint.open(write(changed=changed)).tokenizer
    assert (tokenizer(TEXTS[0])["input_ids"][0] == tokenizer.bos_token_id) == bos


@pytest.mark.parametrize(("in_front", "pieces"), [(None, "\u2581\u2581a"), (True, "\u2581\u2581a"), (False, "\u2581a")])
def test_a_space_in_front_is_one_more(in_front: bool | None, pieces: str, tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581\u2581", "a"]
    changed = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(place) for place in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1],
        "tokenizer.ggml.add_space_prefix": in_front,
        **{f"tokenizer.ggml.{name}_token_id": number for number, name in enumerate(("unknown", "bos", "eos"))},
    }
    path = files.write_gguf(twin("llama", vocab_size=len(tokens)), tmp_path / "spaces.gguf", changed=changed)
    opened = Checkpoint.open(path)
    opened.require_tokenizer()
    assert "".join(opened.tokenizer.tokenize(" a")) == pieces


# ---- the folder that is made of it


def test_the_folder_is_made_once_and_whole(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, home = write(changed={"general.license": "apache-2.0"}), tmp_path / "home"
    made = Checkpoint.open(path, home=home).files
    assert made.parent == home
    assert {tensor.dtype for tensor in load_file(made / "model.safetensors").values()} == {torch.bfloat16}
    assert license_of(made) == {"license": "apache-2.0"}
    assert json.loads((made / "halve.json").read_text())["gguf"]["kinds"] == ["F32"]
    assert "dequantized to bfloat16" in (made / "README.md").read_text()
    before = made.stat().st_mtime_ns, (made / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    for name in (path, tmp_path / "other.gguf"):  # the content counts, not the name
        again = Checkpoint.open(name, home=home).files
        assert (again.stat().st_mtime_ns, (again / "model.safetensors").stat().st_mtime_ns) == before
    monkeypatch.setattr(weights, "dequantized", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _ = Checkpoint.open(write("third.gguf", kind=files.F16), home=home).files
    assert sorted(child.name for child in home.iterdir() if child.is_dir()) == [made.name]


def test_a_folder_that_another_version_made_is_made_anew(
    write: Write, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, home = write(), tmp_path / "home"
    recipe, memo = make_recipe(model=str(path)), tmp_path / "hashes.json"
    with monkeypatch.context() as before:
        before.setattr("halve.model.gguf.file._FORMAT", 1)
        made = Checkpoint.open(path, home=home).files
        key = content(recipe, "teacher", memo, teacher=Checkpoint.open(path, home=home))
    (made / "tokenizer.json").write_text("{}")
    opened = Checkpoint.open(path, home=home)
    assert opened.files == made
    assert (made / "tokenizer.json").read_text() != "{}"
    assert content(recipe, "teacher", memo, teacher=opened) != key


def test_of_two_runs_that_share_a_home_one_makes_the_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, home, made = write(), tmp_path / "home", []
    dequantized = weights.dequantized

    def slowly(*args: Any) -> Any:
        made.append(args)
        time.sleep(0.2)
        return dequantized(*args)

    monkeypatch.setattr(weights, "dequantized", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: Checkpoint.open(path, home=home).files, range(2))
    assert first == second
    assert len(made) == 1
    assert [child.name for child in home.iterdir() if child.is_dir() or child.name.endswith(".lock")] == [first.name]


def test_without_a_home_it_goes_when_nobody_needs_it(write: Write) -> None:
    opened = Checkpoint.open(write())
    made = opened.files
    assert (made / "config.json").is_file()
    del opened
    assert not made.parent.exists()


def test_planning_reads_the_header_alone(
    write: Write, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, recipe = write(), tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(model=str(path)).model_dump(mode="json")))
    monkeypatch.setattr(weights, "dequantized", lambda *_: pytest.fail("weights were read"))
    assert cli.main(["inspect", str(path), "--no-proof"]) == 0
    assert cli.main(["plan", str(path), "--ffn", "40"]) == 0
    assert cli.main(["check", str(recipe), "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["run", str(recipe), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()


# ---- what is refused


def refused(path: Path, message: str) -> None:
    """What `check` asks of a teacher ends in this error."""

    def ask() -> None:
        opened = Checkpoint.open(path)
        opened.require_weights()
        opened.require_tokenizer()

    with pytest.raises(HalveError, match=message):
        ask()


def test_a_file_that_is_not_there_is_not_asked_of_the_hub() -> None:
    assert is_gguf("owner/model.gguf")
    refused(Path("owner/model.gguf"), "there is no model owner/model.gguf\n  why: no such file")


def test_without_the_package_the_error_names_the_extra(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path, find = write(), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *how: None if name == "gguf" else find(name, *how))
    refused(path, r"the package gguf is not installed.*\n  fix: pip install 'halve\[gguf\]'")


def test_a_folder_with_a_gguf_file_says_which_to_give(write: Write) -> None:
    path = write()
    with pytest.raises(CheckpointError, match=f"has no config.json[^$]*fix: give the GGUF file in it: {path}"):
        _ = Checkpoint.open(path.parent).config


@pytest.mark.parametrize("name", ["sha256-1f2e", "tiny.gguf.part1of2"])
def test_a_gguf_file_of_another_name_says_how_to_name_it(name: str, write: Write) -> None:
    path = write().rename(write().with_name(name))
    with pytest.raises(CheckpointError, match=r"is not called a GGUF file\n.*by the ending .gguf\n  fix: rename it"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split.count": 3}, "is one part of a model that was split\n.*counts 3 files\n.*llama-gguf-split --merge"),
        ({"llama.attention.scale": 0.5}, r"says llama.attention.scale 0.5\n.*passes over it"),
        ({"llama.attention.value_length": 16}, r"says llama.attention.value_length 16\n"),
        ({"llama.rope.dimension_count": 4}, r"says llama.rope.dimension_count 4\n"),
        ({"llama.rope.scaling.type": "yarn"}, r"says llama.rope.scaling.type yarn\n"),
        ({"llama.attention.head_count": "four"}, "make no llama config"),
        ({"llama.block_count": 20000}, "has num_hidden_layers: 20000"),
        ({"llama.block_count": 5}, r"lacks model.layers.4.*\n.*38 tensors hold 0"),
        ({"llama.block_count": 3}, r"has an extra tensor blk.3.*\n.*38 tensors are a wrong number"),
        ({"llama.feed_forward_length": 96}, r"has blk.0.ffn_\w+.weight in shape"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
        ({"tokenizer.ggml.pre": "moonrune"}, "splits text in an unknown way\n.*tokenizer.ggml.pre is moonrune"),
        ({"tokenizer.ggml.pre": None}, "splits text in an unknown way\n.*holds no tokenizer.ggml.pre"),
        ({"tokenizer.ggml.model": "wordpiece"}, "cannot load the tokenizer of"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "cannot load the tokenizer of"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(changed: dict[str, Any], message: str, write: Write) -> None:
    refused(write(changed=changed), message)


@pytest.mark.parametrize("architecture", ["falcon", "nothing-known"])
def test_an_unknown_architecture_is_refused(architecture: str, write: Write) -> None:
    path = write()
    content = path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", _text(architecture), 1)
    path.write_bytes(content)
    refused(path, f"is of the unknown architecture {architecture}\n.*llama.*\n  fix: give the model's own folder")


def _text(value: str) -> bytes:
    return len(value).to_bytes(8, "little") + value.encode()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.2.ffn_up.weight": None}, r"lacks model.layers.2.mlp.up_proj.weight\n.*37 tensors hold 0"),
        ({"token_embd.weight": None}, "lacks token_embd.weight"),
        ({"blk.0.attn_q.bias": np.ones(32)}, "has an extra tensor blk.0.attn_q.bias"),
        ({"blk.0.ffn_up.weight": np.ones((32, 32))}, r"has blk.0.ffn_up.weight in shape \(32, 32\)"),
    ],
)
def test_other_tensors_than_the_models_are_refused(tensors: dict[str, Any], message: str, write: Write) -> None:
    refused(write(tensors=tensors), message)


def test_an_unknown_quantization_is_refused(write: Write) -> None:
    path = write(kind=files.F16)
    place = path.read_bytes().find(_text("blk.0.ffn_up.weight")) + len(_text("blk.0.ffn_up.weight")) + 4 + 16
    for kind, named in ((24, "I8"), (250, "250")):
        content = bytearray(path.read_bytes())
        content[place : place + 4] = kind.to_bytes(4, "little")
        path.write_bytes(content)
        assert read_header(path).tensors["blk.0.ffn_up.weight"].kind == kind
        refused(path, f"has the unknown quantization {named}\n.*blk.0.ffn_up.weight is stored so")


def test_a_part_of_several_is_refused_by_its_name(write: Write) -> None:
    refused(write("tiny-00001-of-00002.gguf"), "is one part of a model that was split\n.*its name")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, write: Write) -> None:
    path = write()
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "is not a GGUF file|the header of .* cannot be read|is truncated")


def test_another_file_under_that_name_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    path = Path(shutil.copyfile(tiny_llama / "model.safetensors", tmp_path / "model.gguf"))
    refused(path, "is not a GGUF file")


@pytest.mark.parametrize("change", [{"llama.block_count": 5}, {"tokenizer.ggml.tokens": None}, {"split.count": 2}])
def test_check_tells_it_in_three_lines(
    change: dict[str, Any],
    write: Write,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(model=str(write(changed=change))).model_dump(mode="json")))
    assert cli.main(["check", str(recipe), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"(error: [^\n]+\n  why: [^\n]+\n  fix: [^\n]+\n)+", said), said
    assert not (tmp_path / "run").exists()
