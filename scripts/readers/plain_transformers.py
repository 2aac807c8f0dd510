"""The logits that the transformers of this interpreter computes for saved models.

    python plain_transformers.py STEM MODEL...

Reads `tokens.npy` beside each model's folder and writes into it STEM.npy, or STEM.txt with the reason why there are
no logits.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

stem, *models = sys.argv[1:]

for folder in map(Path, models):
    ids = torch.from_numpy(np.load(folder.parent / "tokens.npy"))[None]
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if astray := [*info["missing_keys"], *info["unexpected_keys"]]:
            raise RuntimeError(f"weights missing or left over: {astray[0]}")
        with torch.no_grad():
            np.save(folder / f"{stem}.npy", model.eval()(input_ids=ids, use_cache=False).logits[0].numpy())
    except Exception as error:
        (folder / f"{stem}.txt").write_text(f"{type(error).__name__}: {error}")
