"""The tokenizer in the header of a GGUF file, as transformers builds it, and only where it splits text as it should.

The header names the rule by which a byte-level vocabulary splits text before anything is merged. transformers has a
part of these rules and takes GPT-2's for all others, which would make other tokens of the same text. What it leaves out
is added here as llama.cpp has it; rules that are in neither are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
    get_gguf_tokenizer,
)

from halve.anatomy.configs import quiet
from halve.anatomy.quirks import (
    GGUF_BYTE_LEVEL,
    GGUF_DIGITS_APART,
    GGUF_OWN_SPACES,
    GGUF_PLAIN_SPLITS,
    GGUF_SPACES,
    GGUF_WHOLE_WORDS,
)
from halve.disk.gguf_header import TOKENS, GgufHeader
from halve.errors import TokenizerError
from halve.model.gguf.config import OWN_FOLDER

_KIND, _SPLIT, _IN_FRONT = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix"
_BOS = "add_bos_token"
_SPACE = "\u2581"


def save_tokenizer(header: GgufHeader, folder: Path) -> None:
    """Write the tokenizer's files, its chat template among them. Raises `TokenizerError`."""
    if TOKENS not in header.values:
        raise TokenizerError(
            f"{header.path} has no tokenizer",
            why=f"its header holds no {TOKENS}",
            fix=f"give a GGUF file with its vocabulary, or {OWN_FOLDER.removeprefix('give ')}",
        )
    _require_known_split(header)
    try:
        with quiet():
            architecture, parts, settings = get_gguf_tokenizer(str(header.path))
            backend, _ = convert_gguf_tokenizer(architecture, parts)
            _complete(header, backend)
            _whole(header, backend, settings).save_pretrained(folder)
    except Exception as error:  # transformers raises many types here, and tokenizers Exception itself
        raise TokenizerError(
            f"cannot load the tokenizer of {header.path}", why=str(error) or repr(error), fix=OWN_FOLDER
        ) from error


def _whole(header: GgufHeader, backend: Tokenizer, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    length = header.setting("context_length")
    longest = {} if length is None else {"model_max_length": int(length)}
    if _takes_whole_words(header):
        settings = {_BOS: True, **settings}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **longest)


def _require_known_split(header: GgufHeader) -> None:
    split = header.values.get(_SPLIT)
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *GGUF_PLAIN_SPLITS, *GGUF_DIGITS_APART}
    if header.values.get(_KIND) == GGUF_BYTE_LEVEL and split not in known:
        raise TokenizerError(
            f"the tokenizer of {header.path} splits text in an unknown way",
            why=f"{_SPLIT} is {split}, which transformers {transformers.__version__} does not know"
            if split is not None
            else f"its header holds no {_SPLIT}, as files of before May 2024",
            fix="give a file that a newer llama.cpp converted, or " + OWN_FOLDER.removeprefix("give "),
        )


def _complete(header: GgufHeader, backend: Tokenizer) -> None:
    """What llama.cpp does to text and transformers' reading of the header leaves out."""
    kind, split = header.values.get(_KIND), header.values.get(_SPLIT)
    if kind == GGUF_BYTE_LEVEL and split in GGUF_DIGITS_APART:
        digits, plain = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, plain])
    if _takes_whole_words(header):
        backend.model.ignore_merges = True
    if kind == GGUF_SPACES and header.architecture not in GGUF_OWN_SPACES:
        spaces = normalizers.Replace(" ", _SPACE)
        in_front = [normalizers.Prepend(_SPACE)] if header.values.get(_IN_FRONT, True) else []
        backend.normalizer = normalizers.Sequence([*in_front, spaces])
        backend.pre_tokenizer = None


def _takes_whole_words(header: GgufHeader) -> bool:
    return header.values.get(_KIND) == GGUF_BYTE_LEVEL and header.values.get(_SPLIT) in GGUF_WHOLE_WORDS
