"""The tensors in a GGUF file, dequantized and put where transformers' model has them.

Which tensor is which, how each quantization is unpacked, and what llama.cpp's converter did to a weight (rows of q and
k in pairs, norms plus one) is transformers' and gguf's knowledge. That every tensor arrives is checked here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, get_tensor_name_map
from gguf import quants as gguf_quants
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from halve.anatomy.configs import build, num_layers
from halve.disk.gguf_header import GgufHeader, GgufTensor
from halve.errors import CheckpointError
from halve.model.gguf.config import OWN_FOLDER, ROPE_FREQS

_VALUES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
_AGAIN = "copy or download the file again"


def quantizations(header: GgufHeader) -> list[str]:
    """The names of the quantizations in the file. Raises `CheckpointError` for one that cannot be unpacked."""
    return sorted(_known(header, kind).name for kind in {tensor.kind for tensor in header.tensors.values()})


def require_whole(header: GgufHeader) -> None:
    """Raise `CheckpointError` unless every tensor ends within the file and can be unpacked."""
    quantizations(header)
    for name, tensor in header.tensors.items():
        _require_end(header, name, tensor)


def require_model(header: GgufHeader, config: PretrainedConfig) -> None:
    """Raise `CheckpointError` unless the file holds the model's tensors, all and no other."""
    model = build(config, device="meta")
    places = _Places(header, model)
    wanted = dict(_parameters(model))
    sizes = dict.fromkeys(wanted, 0)
    for name, tensor in header.tensors.items():
        if name == ROPE_FREQS:
            continue
        place = places.of(name)
        if place not in wanted:
            raise CheckpointError(
                f"{header.path} has an extra tensor {name}",
                why=f"the model that its header describes has no such weight; it would be lost, and the file's"
                f" {len(header.tensors)} tensors are a wrong number",
                fix=OWN_FOLDER,
            )
        sizes[place] += math.prod(tensor.shape)
        if places.parts[place] == 1:
            _require_shape(header, name, tensor, wanted[place])
    for name, size in sizes.items():
        if size != wanted[name].numel():
            raise CheckpointError(
                f"{header.path} lacks {name}" if not size else f"{header.path} has not all of {name}",
                why=f"the model that its header describes has {wanted[name].numel()} numbers there, and the file's"
                f" {len(header.tensors)} tensors hold {size}",
                fix=_AGAIN,
            )


def dequantized(header: GgufHeader, config: PretrainedConfig) -> PreTrainedModel:
    """The model of the file in main memory, in bfloat16. Raises `CheckpointError`."""
    model = build(config, device="meta", dtype=torch.bfloat16)
    places = _Places(header, model)
    try:
        empty = model.state_dict()
        filled = places.fill(GGUFReader(header.path))
        weights = {name: _like(empty[name], value).to(torch.bfloat16) for name, value in filled}
        odd = model.load_state_dict(weights, strict=False, assign=True)
    except (ValueError, RuntimeError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"the tensors of {header.path} do not fit its model", why=str(error), fix=OWN_FOLDER
        ) from error
    model.tie_weights()
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if odd.unexpected_keys or left:
        raise CheckpointError(
            f"{header.path} does not hold its model",
            why=f"{(odd.unexpected_keys + left)[0]} is in only one of the two",
            fix=OWN_FOLDER,
        )
    return model.requires_grad_(False)


class _Places:
    """Where the model has the tensors of a file."""

    def __init__(self, header: GgufHeader, model: PreTrainedModel) -> None:
        kind = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
        self.processor = kind(config=model.config.to_dict())
        self.names: dict[str, str] = {}
        number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
        table = get_tensor_name_map(number, num_layers(model.config))
        for state_key in model.state_dict():
            name = self.processor.preprocess_name(state_key)
            stem, dot, last = name.rpartition(".")
            ending = dot + last if last in ("weight", "bias") else ""
            if (theirs := table.get_name(stem if ending else name)) is not None:
                self.names[theirs + ending] = name
            else:
                self.processor.perform_fallback_tensor_mapping(self.names, ending, "", name)
        self.parts = Counter(self.names.values())

    def of(self, name: str) -> str | None:
        """The model's name for a tensor of the file; transformers drops the ending of experts that lie together."""
        return self.names.get(name, self.names.get(name.removesuffix(".weight")))

    def fill(self, reader: GGUFReader) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors by their names, in float32."""
        fused: dict[str, Any] = {"tensors": {}}
        for tensor in reader.tensors:
            made = self.processor.process(
                weights=gguf_quants.dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=self.names,
                parsed_parameters=fused,
            )
            if made.name in self.names:
                yield self.names[made.name], torch.from_numpy(np.array(made.weights, dtype=np.float32))
        yield from fused["tensors"].items()


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What a file must hold: parameters and saved buffers, a tied table once, under the name that comes first."""
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _like(wanted: Tensor, value: Tensor) -> Tensor:
    """The value in the wanted shape where dimensions of length one are all that differs."""
    return value.reshape(wanted.shape) if value.squeeze().shape == wanted.squeeze().shape else value


def _require_shape(header: GgufHeader, name: str, tensor: GgufTensor, wanted: Tensor) -> None:
    """Dimensions of length one come and go, and some matrices lie the other way round."""
    stored_sizes, wanted_sizes = (
        sorted(size for size in shape if size != 1) for shape in (tensor.shape, tuple(wanted.shape))
    )
    if stored_sizes != wanted_sizes:
        raise CheckpointError(
            f"{header.path} has {name} in shape {tensor.shape}",
            why=f"by its header the shape is {tuple(wanted.shape)}",
            fix=_AGAIN,
        )


def _require_end(header: GgufHeader, name: str, tensor: GgufTensor) -> None:
    block, num_bytes = GGML_QUANT_SIZES[_known(header, tensor.kind)]
    end = header.data_start + tensor.offset + math.prod(tensor.shape) // block * num_bytes
    if not tensor.shape or tensor.shape[-1] % block:
        raise CheckpointError(
            f"{header.path} has {name} in shape {tensor.shape}",
            why=f"it is stored in blocks of {block} numbers, and they do not fill a row",
            fix=_AGAIN,
        )
    if end > header.size:
        raise CheckpointError(
            f"{header.path} is truncated",
            why=f"it has {header.size} bytes, and {name} ends at {end}",
            fix=_AGAIN,
        )


def _known(header: GgufHeader, kind: int) -> GGMLQuantizationType:
    try:
        quantization = GGMLQuantizationType(kind)
        if quantization not in _VALUES:  # a block of zeros shows whether there is code for it
            gguf_quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[quantization][1]), dtype=np.uint8), quantization)
    except (ValueError, KeyError, NotImplementedError) as error:
        of = next(name for name, tensor in header.tensors.items() if tensor.kind == kind)
        named = GGMLQuantizationType(kind).name if kind in {known.value for known in GGMLQuantizationType} else kind
        raise CheckpointError(
            f"{header.path} has the unknown quantization {named}",
            why=f"{of} is stored so, and the package gguf here cannot unpack it",
            fix="pip install -U gguf if a newer one can, or give another file of the model, such as its Q8_0",
        ) from error
    return quantization
