"""Decode speed of GGUF files in llama.cpp, for `real_decode.py`, in an interpreter with llama-cpp-python.

    python llama_cpp_decode.py THREADS PROMPT NEW REPEATS FILE...

Prints a list of tokens a second: medians over the repeats, in which the files take turns. A first turn is not counted.
"""

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp


def main() -> None:
    """Load all files, time them in turns, and print."""
    threads, prompt, new, repeats = (int(given) for given in sys.argv[1:5])
    contexts = [opened(file, threads, prompt + new) for file in sys.argv[5:]]
    seconds: list[list[float]] = [[] for _ in contexts]
    for repeat in range(repeats + 1):
        for context, kept in zip(contexts, seconds, strict=True):
            took = decode_seconds(context, prompt, new)
            if repeat:
                kept.append(took)
    print(json.dumps([new / statistics.median(kept) for kept in seconds]))


def opened(file: str, threads: int, tokens: int) -> Any:
    """A context of one sequence of so many tokens."""
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    assert model, f"llama.cpp does not load {file}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = tokens
    params.n_threads = params.n_threads_batch = threads
    return llama_cpp.llama_init_from_model(model, params)


def decode_seconds(context: Any, prompt: int, new: int) -> float:
    """Read a prompt, then so many tokens one at a time; the time of the latter."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    step(context, range(100, 100 + prompt))
    began = time.perf_counter()
    for token in range(200, 200 + new):
        step(context, [token])
    return time.perf_counter() - began


def step(context: Any, tokens: Sequence[int]) -> None:
    """One pass; its logits are computed for the last token."""
    given = (llama_cpp.llama_token * len(tokens))(*tokens)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(given, len(tokens))) == 0
    llama_cpp.llama_synchronize(context)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp says how it loads."""


llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
main()
