"""The folder of a run, made up: every stage has ended."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from halve.disk.files import file_sha256, sealed, write_json

BEFORE = {"layers": 10, "hidden": 128, "ffn": 352, "heads": 8, "kv_heads": 4, "head_dim": 16, "vocab": 2048}
AFTER = BEFORE | {"layers": 8, "hidden": 112, "ffn": 240}
KEPT_LAYERS = [0, 1, 2, 3, 5, 6, 8, 9]
# params, non-embedding, nll, kl, agreement, accuracy
MODELS = {
    "teacher": (1_871_232, 1_609_088, 1.92, 0.214, 0.78, 0.812),
    "corrected": (1_871_232, 1_609_088, 1.71, None, None, 0.806),
    "pruned": (1_033_200, 803_824, 4.43, 2.61, 0.24, 0.331),
    "distilled": (1_033_200, 803_824, 1.93, 0.197, 0.752, 0.742),
    "ce": (1_033_200, 803_824, 1.99, 0.302, 0.711, 0.708),
    "random_init": (1_033_200, 803_824, 2.74, 1.08, 0.493, 0.402),
}


def estimate(value: float | None, stderr: float) -> dict[str, float] | None:
    return None if value is None else {"value": value, "stderr": stderr}


def results() -> dict[str, Any]:
    models = {}
    for name, (params, bare, nll, kl, agreement, accuracy) in MODELS.items():
        small = params < 1_500_000
        one = {
            "params": params,
            "non_embedding_params": bare,
            "weight_bytes": 4 * params,
            "dtype": "float32",
            "nll": estimate(nll, 0.031),
            "perplexity": estimate(math.exp(nll), 0.031 * math.exp(nll)),
            "bits_per_byte": estimate(nll / 3.1 / math.log(2), 0.0142),
            "choices": {
                "next_line": estimate(accuracy, 0.021)
                | {"items": 360, "acc": estimate(accuracy - 0.0625, 0.021), "acc_norm": None}
            },
            "speed": {
                "prefill_tokens_per_second": 21_400.0 if small else 12_100.0,
                "decode_tokens_per_second": 412.3 if small else 287.9,
                "peak_memory_bytes": 6_412_000 if small else 10_911_000,
            },
        }
        if kl is not None:
            one |= {"kl": estimate(kl, 0.02 * kl + 0.002), "agreement": estimate(agreement, 0.006)}
        models[name] = one
    ours = models["distilled"]
    against = {
        name: {
            "nll": estimate(ours["nll"]["value"] - one["nll"]["value"], 0.008),
            "choices": {
                "next_line": estimate(
                    ours["choices"]["next_line"]["value"] - one["choices"]["next_line"]["value"], 0.019
                )
            },
        }
        | (
            {"kl": estimate(ours["kl"]["value"] - one["kl"]["value"], 0.006), "agreement": estimate(0.04, 0.004)}
            if "kl" in one
            else {}
        )
        for name, one in models.items()
        if name != "distilled"
    }
    prompts = {
        "Return the number of": " items in the list, or None if the sequence is empty.\n\n    If *key* is given, it "
        "must be a callable that",
        "Raise ValueError if <b>": " the argument is not a valid integer & the stream has been closed.",
    }
    return {
        "reference": "corrected",
        "samples": {"count": 64, "context": 256, "tokens": 16320, "bytes": 50_592, "fingerprint": "ab" * 32},
        "machine": {"device": "CPU, 2 cores", "threads": 2},
        "speed_test": {"batch": 1, "prompt_tokens": 224, "new_tokens": 32, "repeats": 5},
        "models": models,
        "differences": {"subject": "distilled", "against": against},
        "completions": [
            {
                "prompt": prompt,
                "texts": {name: text if name != "pruned" else " the the of self, the the the of" for name in MODELS},
            }
            for prompt, text in prompts.items()
        ],
    }


def metrics(start: float, end: float, *, noise: int, ce: float) -> list[str]:
    random = np.random.default_rng(noise)
    lines = [{"step": 0, "tokens": 0, "heldout": {"kl": start, "ce": start + ce, "agreement": 0.2}}]
    for step in range(1, 301):
        level = end + (start - end) * math.exp(-step / 22) + 0.3 * (end + 0.2) * math.exp(-step / 120)
        line: dict[str, Any] = {
            "step": step,
            "tokens": step * 8192,
            "loss": level * math.exp(0.06 * random.standard_normal()),
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens_per_second": 20_000.0,
        }
        if step % 25 == 0:
            line["heldout"] = {"kl": level, "ce": level + ce, "agreement": 0.7}
        lines.append(line)
    return [json.dumps(line) for line in lines]


def scores() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    shape = {axis: BEFORE[axis] for axis in ("hidden", "ffn", "heads")}
    heads = random.lognormal(0, 0.6, (BEFORE["layers"], shape["heads"])).astype(np.float32)
    return {
        "layers": np.array([0.61, 0.22, 0.15, 0.13, 0.07, 0.11, 0.10, 0.06, 0.12, 0.34], dtype=np.float32),
        "hidden": random.lognormal(0, 0.7, shape["hidden"]).astype(np.float32) * 40,
        "ffn": random.lognormal(0, 0.9, (BEFORE["layers"], shape["ffn"])).astype(np.float32),
        "heads": heads,
        "kv_heads": heads.reshape(BEFORE["layers"], -1, 2).sum(-1),
    }


def make_run(folder: Path) -> Path:
    """A finished run, as the pipeline leaves it, models left out."""
    folder.mkdir(parents=True)
    recipe = {
        "name": "demo",
        "model": "/home/someone/secret/teacher",
        "seed": 0,
        "data": {"train": ["/home/someone/secret/train.jsonl"], "valid": ["hub:owner/name:valid"], "context": 256},
        "correct": None,
        "prune": {"non_embedding_ratio": 0.5, "params": None, "gain": "fitted"},
        "distill": {"tokens": 2_457_600, "lr": 1e-3, "baselines": ["ce", "random_init"]},
        "evaluate": {"prompts": ["/etc is kept"], "choices": ["/home/someone/secret/next_line.jsonl"]},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"format": 1, "recipe": "demo", "model": recipe["model"]}))
    files: dict[str, dict[str, Any]] = {
        "correct": {"metrics.jsonl": metrics(0.25, 0.0, noise=4, ce=1.7)},
        "score": {},
        "prune": {
            "plan.json": {
                "family": "llama",
                "before": BEFORE,
                "after": AFTER,
                "layers": KEPT_LAYERS,
                "hidden": list(range(112)),
                "ffn": [list(range(240))] * 8,
                "heads": [list(range(8))] * 7 + [[0, 1, 2, 4, 5, 6, 7]],
                "kv_heads": [[0, 1, 2, 3]] * 8,
                "gain": "fitted",
                "made": {
                    "cut": "plain",
                    "compared": {"refit_kl": 1.3149, "plain_kl": 1.2, "compared_tokens": 4096},
                    "rotation": "none",
                    "unrotated": "the plain cut keeps it",
                },
            }
        },
        "distill": {"metrics.jsonl": metrics(2.6, 0.19, noise=1, ce=1.72)},
        "distill-ce": {"metrics.jsonl": metrics(2.6, 0.29, noise=2, ce=1.69)},
        "distill-random_init": {"metrics.jsonl": metrics(5.9, 1.02, noise=3, ce=1.70)},
        "evaluate": {"results.json": results()},
    }
    for stage, contents in files.items():
        (folder / stage).mkdir()
        for name, content in contents.items():
            text = "\n".join(content) if isinstance(content, list) else json.dumps(content)
            (folder / stage / name).write_text(text, encoding="utf-8")
        manifest = {
            "stage": stage,
            "key": hashlib.sha256(stage.encode()).hexdigest(),
            "seed": 0,
            "inputs": {},
            "versions": {"python": "3.11.7", "halve": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "metrics": {},
        }
        write_json(folder / stage / "manifest.json", sealed(manifest))
    about = {"model": "ef" * 32, "samples": "01" * 32, "batch_agg": "l2", "seq_agg": "mean"}
    save_file(scores(), folder / "score/scores.safetensors", metadata={"format": "x", "about": json.dumps(about)})
    for stage in files:
        seal(folder / stage)
    (folder / ".distill.work").mkdir()
    return folder


def seal(stage: Path) -> None:
    """Write down what the files of a stage hold; its model is left out and stands there all the same."""
    manifest = json.loads((stage / "manifest.json").read_text())
    listed = (path for path in stage.rglob("*") if path.is_file() and path.name != "manifest.json")
    here = {path.relative_to(stage).as_posix(): path for path in listed}
    found = {name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for name, path in here.items()}
    found["model/model.safetensors"] = {"size": 4_132_800, "sha256": "cd" * 32}
    manifest.pop("digest")
    write_json(stage / "manifest.json", sealed({**manifest, "files": found}))
