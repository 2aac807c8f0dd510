"""The logits that llama.cpp computes for saved models, in an interpreter with llama-cpp-python and its converter.

    python plain_llama_cpp.py SOURCE STEM MODEL...

SOURCE is the source package of llama-cpp-python; its `vendor/llama.cpp` holds the converter. A random twin has no
tokenizer, so the converter is told to leave it out (it counts the entries of one in places); everything else is
llama.cpp's own way. Reads `tokens.npy` beside each model's folder and writes into it STEM.npy, or STEM.txt with the
reason why there are no logits.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

source, stem, *models = sys.argv[1:]
sys.path.pop(0)  # this folder: a module here would hide the package of the same name
sys.path.insert(0, str(Path(source) / "vendor" / "llama.cpp"))

import llama_cpp  # noqa: E402
import torch  # noqa: E402
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # noqa: E402
from conversion.base import gguf  # noqa: E402


def convert(folder: Path) -> Path:
    """Write the model as float32 GGUF without a tokenizer."""
    hparams = ModelBase.load_hparams(folder, False)
    entries = {"model": {"vocab": {str(i): i for i in range(hparams["vocab_size"])}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(entries))
    kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT), mmproj=False)

    class Bare(kind):  # type: ignore[misc, valid-type]
        model_arch = kind.model_arch

        def set_vocab(self) -> None:
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    made = folder / "float32.gguf"
    made.unlink(missing_ok=True)
    with torch.inference_mode():
        Bare(folder, gguf.LlamaFileType.ALL_F32, made).write()
    return made


def logits(file: Path, tokens: NDArray[Any]) -> NDArray[Any]:
    """Logits [tokens, vocab] of one sequence, with caches in float32 and no fused attention."""
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp does not load it")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, True
        batch.seq_id[i][0] = 0
    if llama_cpp.llama_decode(context, batch):
        raise RuntimeError("llama.cpp loads it and cannot decode")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(tokens), vocab)).copy()
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


said: list[str] = []


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def heed(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Keep what llama.cpp says of errors."""
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        said.append(text.decode(errors="replace").strip())


def answer(folder: Path, tokens: NDArray[Any]) -> None:
    """Write what llama.cpp says to one model."""
    llama_cpp.llama_log_set(heed, ctypes.c_void_p(0))
    try:
        file = convert(folder)
        np.save(folder / f"{stem}.npy", logits(file, tokens))
        file.unlink()
    except Exception as error:
        (folder / f"{stem}.txt").write_text(said[0] if said else f"{type(error).__name__}: {error}")


for model in map(Path, models):
    # the converter keeps what it read in its classes, and llama.cpp may abort: each model has a process of its own
    if (child := os.fork()) == 0:
        answer(model, np.load(model.parent / "tokens.npy"))
        os._exit(0)
    os.waitpid(child, 0)
