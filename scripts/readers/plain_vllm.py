"""The log-probabilities that vLLM computes for saved models, in an interpreter with its build for CPUs.

    python plain_vllm.py STEM MODEL...

Reads `tokens.npy` beside each model's folder and writes into it STEM.npy (for every token but the first, of the whole
vocabulary), or STEM.txt with the reason why there are none.
"""

import gc
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import numpy as np
from numpy.typing import NDArray
from vllm import LLM, SamplingParams


def log_probabilities(folder: Path, tokens: list[int]) -> NDArray[np.float32]:
    """Log-probabilities [tokens - 1, vocab] of what follows each token but the last."""
    engine = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
        max_num_batched_tokens=64,  # what is tried out at the start
        num_gpu_blocks_override=32,
        max_logprobs=-1,
        disable_log_stats=True,
    )
    try:
        wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
        (answer,) = engine.generate({"prompt_token_ids": tokens}, wanted, use_tqdm=False)
    finally:
        engine.llm_engine.engine_core.shutdown()
    rows = answer.prompt_logprobs[1:]
    return np.array([[row[token].logprob for token in range(len(row))] for row in rows], dtype=np.float32)


if __name__ == "__main__":
    stem, *models = sys.argv[1:]
    gc.collect = lambda *_: 0  # vLLM collects eight times a model: most of the time that a tiny one takes
    for model in map(Path, models):
        try:
            found = log_probabilities(model, np.load(model.parent / "tokens.npy").tolist())
            np.save(model / f"{stem}.npy", found)
        except Exception as error:
            (model / f"{stem}.txt").write_text(f"{type(error).__name__}: {error}")
