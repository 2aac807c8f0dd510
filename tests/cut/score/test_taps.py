"""Hooks on small models: the right points, the right numbers, nothing kept, nothing left behind."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from plain_scores import channel_importance
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from halve.anatomy import Anatomy, discover
from halve.cut.score.calibration import Calibration
from halve.cut.score.importance import block_importance, seq_statistics, sums_over_batch
from halve.cut.score.scores import Scores, Statistics
from halve.cut.score.taps import find_points, measure_activations
from halve.errors import AnatomyError, CheckpointError
from halve.model.hooks import on_input, on_output, on_passage


def tiny(model_type: str, **changes: Any) -> PretrainedConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
    }
    return AutoConfig.for_model(model_type, **{**sizes, **changes})


def build(config: PretrainedConfig) -> tuple[PreTrainedModel, Anatomy]:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, discover(config)


@pytest.fixture(scope="module")
def llama() -> tuple[PreTrainedModel, Anatomy]:
    return build(tiny("llama"))


@pytest.fixture(scope="module")
def samples_BS() -> Tensor:
    return torch.randint(64, (8, 24), generator=torch.Generator().manual_seed(1))


def scores(statistics: Statistics) -> Scores:
    return statistics.scores(batch_agg="l2", seq_agg="mean", model="m", samples="s")


def test_scores_are_what_the_layers_read(llama: tuple[PreTrainedModel, Anatomy], samples_BS: Tensor) -> None:
    model, anatomy = llama
    read: dict[str, Tensor] = {}
    passed: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as hooks, torch.inference_mode():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(on_input(module, partial(read.__setitem__, name)))
        for i in range(3):
            module = model.get_submodule(f"model.layers.{i}")
            hooks.enter_context(on_passage(module, lambda x, y: passed.append((x, y))))
        model(samples_BS)
    found = scores(measure_activations(Calibration(model, anatomy, samples_BS, 8)))

    layer = "model.layers.{}.{}".format
    assert found.ffn is not None
    assert found.heads is not None
    assert found.kv_heads is not None
    assert found.hidden is not None
    for i in range(3):
        torch.testing.assert_close(found.ffn[i], channel_importance(read[layer(i, "mlp.down_proj")]))
        by_channel = channel_importance(read[layer(i, "self_attn.o_proj")])
        torch.testing.assert_close(found.heads[i], by_channel.view(4, 8).norm(dim=1))
        torch.testing.assert_close(found.kv_heads[i], found.heads[i].view(2, 2).sum(1))
    hidden = sum(
        channel_importance(read[layer(i, name)]) for i in range(3) for name in ("self_attn.k_proj", "mlp.up_proj")
    )
    torch.testing.assert_close(found.hidden, hidden)
    turns = torch.stack([block_importance(before, after).mean().float() for before, after in passed])
    torch.testing.assert_close(found.layers, turns)
    assert (turns > 0.01).all()
    assert all(after.equal(before) for (_, after), (before, _) in pairwise(passed))


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batch_does_not_matter(
    llama: tuple[PreTrainedModel, Anatomy], samples_BS: Tensor, micro_batch: int
) -> None:
    whole = measure_activations(Calibration(*llama, samples_BS, 8))
    parts = measure_activations(Calibration(*llama, samples_BS, micro_batch))
    torch.testing.assert_close(parts.block_sums, whole.block_sums, rtol=1e-5, atol=1e-6)
    for axis, sums in whole.sums.items():
        torch.testing.assert_close(parts.sums[axis], sums, rtol=2e-5, atol=1e-7)
    assert parts.num_samples == whole.num_samples == 8


# By family: one reader of each distinct tensor that a layer reads from the residual stream
POINTS = {
    "llama": ["self_attn.q_proj", "mlp.gate_proj"],
    "phi3": ["self_attn.qkv_proj", "mlp.gate_up_proj"],
    "gemma2": ["self_attn.q_proj", "mlp.gate_proj"],
    "olmo2": ["self_attn.q_proj", "mlp.gate_proj"],
    "nemotron": ["self_attn.q_proj", "mlp.up_proj"],
    "cohere2": ["self_attn.q_proj"],
}


@pytest.mark.parametrize("model_type", POINTS)
def test_each_tensor_is_read_once(model_type: str, samples_BS: Tensor) -> None:
    model, anatomy = build(tiny(model_type, head_dim=8))
    points = find_points(model, anatomy)
    modules = [name for layer, name in points["hidden"] if layer == 0]
    read: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.inference_mode():
        for name in anatomy.readers("hidden")[0]:
            hooks.enter_context(on_input(model.get_submodule(name), partial(read.__setitem__, name)))
        model.base_model(input_ids=samples_BS[:1])

    def tensors(names: Iterable[str]) -> set[int]:
        return {read[name].data_ptr() for name in names}

    expected = [f"model.layers.0.{name}" for name in POINTS[model_type]]
    assert len(modules) == len(expected)
    assert tensors(modules) == tensors(expected) == tensors(read)
    assert [len(points[axis]) for axis in ("ffn", "heads")] == [3, 3]


@pytest.mark.parametrize("model_type", ["phi", "olmo2", "starcoder2", "stablelm", "gpt_neox", "gpt2"])
def test_other_layouts_are_scored(model_type: str, samples_BS: Tensor) -> None:
    names = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "vocab_size": 64}
    config = AutoConfig.for_model("gpt2", **names) if model_type == "gpt2" else tiny(model_type)
    model, anatomy = build(config)
    found = scores(measure_activations(Calibration(model, anatomy, samples_BS, 4)))
    sizes = anatomy.sizes
    shapes = {"layers": (3,), "hidden": (32,), "ffn": (3, 48), "heads": (3, 4), "kv_heads": (3, sizes.kv_heads)}
    for axis, tensor in found.by_axis().items():
        assert tuple(tensor.shape) == shapes[axis]
        assert (tensor > 0).all(), axis
    assert {"layers", "ffn"} <= set(found.by_axis())


def test_bfloat16_is_reduced_in_float32(samples_BS: Tensor) -> None:
    model, anatomy = build(tiny("llama"))
    model = model.bfloat16()
    read: list[Tensor] = []
    name = anatomy.readers("ffn")[1][0]
    with on_input(model.get_submodule(name), read.append):
        sums = measure_activations(Calibration(model, anatomy, samples_BS, 8)).sums["ffn"]
    assert read[-1].dtype == torch.bfloat16
    torch.testing.assert_close(sums[:, :, 1], sums_over_batch(seq_statistics(read[-1].float())))


def test_nothing_is_kept_and_no_hook_stays(samples_BS: Tensor) -> None:
    model, anatomy = build(tiny("llama"))
    seen: list[weakref.ref[Tensor]] = []
    alive_at: list[int] = []

    def watch(act: Tensor) -> None:
        alive_at.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(act))

    watched = [name for axis in ("ffn", "heads") for layer in anatomy.readers(axis) for name in layer]
    with ExitStack() as hooks:
        for name in watched:
            hooks.enter_context(on_input(model.get_submodule(name), watch))
        measure_activations(Calibration(model, anatomy, samples_BS, 8))
    passes = len(seen) // len(watched)
    assert passes == 2  # two tokens that find the points, and the samples
    assert all(ref() is None for ref in seen)
    assert max(alive_at[len(watched) :]) == 0, "an earlier activation was alive when a later one came"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_hooks_go_when_the_pass_fails(samples_BS: Tensor) -> None:
    model, anatomy = build(tiny("llama"))
    with pytest.raises(IndexError):
        measure_activations(Calibration(model, anatomy, samples_BS + 64, 8))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_activations_that_are_not_finite_are_refused(samples_BS: Tensor) -> None:
    model, anatomy = build(tiny("llama"))
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[3] = float("inf")  # type: ignore[index,operator]
    with pytest.raises(CheckpointError, match=r"not finite, first at .*layer.*1") as error:
        measure_activations(Calibration(model, anatomy, samples_BS, 8))
    assert error.value.fix.startswith("try dtype: float32")


def test_a_module_that_is_not_called_is_refused(llama: tuple[PreTrainedModel, Anatomy]) -> None:
    model, anatomy = llama
    unused = nn.Linear(48, 32)
    model.model.layers[1].mlp.extra = unused
    try:
        wrong = replace(
            anatomy,
            modules={**anatomy.modules, "model.layers.1.mlp.extra": anatomy.modules[anatomy.readers("ffn")[0][0]]},
        )
        with pytest.raises(AnatomyError, match="cannot score ffn of family llama") as error:
            find_points(model, wrong)
        assert error.value.why == "model.layers.1.mlp.extra is called 0 times in a forward pass"
        refused = replace(wrong, refusals={"ffn": "a reason"})
        assert set(find_points(model, refused)) == {"hidden", "heads"}
    finally:
        del model.model.layers[1].mlp.extra


# By family: the module whose output is the paper's X W_1, and the module that follows it
FIRST = {
    "llama": "mlp.gate_proj",
    "gemma2": "mlp.gate_proj",
    "olmo2": "mlp.gate_proj",
    "phi3": "mlp.gate_up_proj",
    "nemotron": "mlp.up_proj",
    "starcoder2": "mlp.c_fc",
    "gpt_neox": "mlp.dense_h_to_4h",
}


@pytest.mark.parametrize("model_type", FIRST)
def test_the_first_matrix_is_read_before_the_activation(model_type: str, samples_BS: Tensor) -> None:
    model, anatomy = build(tiny(model_type))
    written: list[Tensor] = []
    module = model.get_submodule(f"{anatomy.layers_path}.1.{FIRST[model_type]}")
    with on_output(module, written.append):
        found = scores(measure_activations(Calibration(model, anatomy, samples_BS, 3), ffn_point="up_output")).ffn
    assert found is not None
    first_block = torch.cat(written[-3:])[..., :48]
    torch.testing.assert_close(found[1], channel_importance(first_block))
    other = scores(measure_activations(Calibration(model, anatomy, samples_BS, 3))).ffn
    assert other is not None
    assert not torch.allclose(found, other)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma2"])
def test_the_gate_is_what_the_activation_function_reads(model_type: str, samples_BS: Tensor) -> None:
    model, anatomy = build(tiny(model_type))
    activated: list[Tensor] = []
    layer = model.get_submodule("model.layers.0.mlp")
    function = next(m for name, m in layer.named_children() if "act" in name)
    with on_input(function, activated.append):
        found = scores(measure_activations(Calibration(model, anatomy, samples_BS, 8), ffn_point="up_output")).ffn
    assert found is not None
    torch.testing.assert_close(found[0], channel_importance(activated[-1]))


def test_only_ffn_moves_with_its_point(llama: tuple[PreTrainedModel, Anatomy], samples_BS: Tensor) -> None:
    points = ("down_input", "up_output")
    down, up = (measure_activations(Calibration(*llama, samples_BS, 8), ffn_point=point) for point in points)
    assert up.sums["hidden"].equal(down.sums["hidden"])
    assert up.sums["heads"].equal(down.sums["heads"])
    assert (down.ffn_point, up.ffn_point) == ("down_input", "up_output")


def test_a_layer_without_a_first_matrix_is_refused(llama: tuple[PreTrainedModel, Anatomy], samples_BS: Tensor) -> None:
    model, anatomy = llama
    gone = ("1.mlp.gate_proj", "1.mlp.up_proj")
    left = {name: expr for name, expr in anatomy.modules.items() if not name.endswith(gone)}
    with pytest.raises(AnatomyError, match="cannot score ffn of family llama") as error:
        measure_activations(Calibration(model, replace(anatomy, modules=left), samples_BS, 8), ffn_point="up_output")
    assert error.value.why == "no module of layer 1 makes it"
