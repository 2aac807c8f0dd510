"""Cut random twins along each axis, let the runtimes compute them, and write what differs into the package's table.

    python scripts/runtimes.py WORK [--family NAME ...] [--transformers PYTHON] [--vllm PYTHON]
                               [--llama-cpp PYTHON --llama-cpp-source FOLDER]

Run by hand: each runtime lives in an environment of its own, whose interpreter is given here (CONTRIBUTING.md says
how they are made). WORK keeps the twins, so an interrupted run resumes. `make docs` prints the table.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from halve.anatomy import Anatomy, Arch, discover, runtimes
from halve.anatomy.configs import quiet
from halve.anatomy.runtimes import (
    DEPTH_CUT,
    IN_PLACE,
    PROPORTION,
    WHOLE,
    Measurement,
    family_and_traits,
    measured,
    period,
)
from halve.cut.plan.plan import select
from halve.cut.proof.prove import prove
from halve.cut.proof.twins import RandomScores, random_twin
from halve.cut.surgery.trim import trim
from halve.errors import HalveError
from halve.model.saving import save_model

READERS = Path(__file__).parent / "readers"
TOKENS = 40
SIZES = {"num_hidden_layers": 8, "hidden_size": 384, "num_attention_heads": 12, "vocab_size": 256}
SMALL: dict[str, dict[str, int]] = {
    "hidden": {"hidden": 192},
    "ffn": {"ffn": 160},
    "heads": {"heads": 8},
    "kv_heads": {"heads": 6, "kv_heads": 2},
}
WINDOW = {"sliding_window": 6}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 320}
# Every twin with what its own config needs. A family stands twice where a trait of its models decides.
TWINS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),
    ("mistral", {"sliding_window": None}),
    ("mistral", WINDOW),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma", {}),
    ("gemma2", {**WINDOW, "query_pre_attn_scalar": 32}),
    ("gemma2", {**WINDOW, "query_pre_attn_scalar": 48, "hidden_size": 576, "num_hidden_layers": 46}),
    ("gemma3_text", {**WINDOW, "query_pre_attn_scalar": 32, "num_hidden_layers": 12}),
    ("gemma3_text", {**WINDOW, "query_pre_attn_scalar": 48, "hidden_size": 576, "num_hidden_layers": 62}),
    ("phi", {"num_key_value_heads": 12, "intermediate_size": 1536}),
    ("phi3", {}),
    ("phi3", WINDOW),
    ("nemotron", {}),
    ("olmo", {}),
    ("olmo2", {}),
    ("olmo3", WINDOW),
    ("granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    ("smollm3", {}),
    ("starcoder2", {"sliding_window": None}),
    ("starcoder2", WINDOW),
    ("gpt_neox", {}),
    ("gpt_neo", {"attention_types": [[["global", "local"], 4]], "window_size": 8, "num_layers": 8}),
    ("gpt2", {"n_inner": 1536}),
    ("opt", {"ffn_dim": 320, "word_embed_proj_dim": 384}),
    ("stablelm", {}),
    ("cohere", {}),
    ("cohere2", {**WINDOW, "rotary_pct": 1.0}),  # as its checkpoints have it
    ("glm4", {}),
    ("arcee", {}),
    ("seed_oss", {}),
    ("apertus", {}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 8}),
    ("exaone4", {**WINDOW, "sliding_window_pattern": 4, "num_hidden_layers": 64}),
    ("ernie4_5", {}),
    ("mixtral", EXPERTS),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 320}),
    ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    ("gpt_oss", {**WINDOW, **EXPERTS}),
    ("llama4_text", {**EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 320}),
)


def main() -> None:
    """Make the twins, ask the runtimes that were given, and bring the table up to date."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--family", nargs="+", default=[])
    for name in ("--transformers", "--vllm", "--llama-cpp", "--llama-cpp-source"):
        parser.add_argument(name)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    folders = []
    for family, values in TWINS:
        if not asked.family or family in asked.family:
            config = twin_config(family, values)
            folders.append(asked.work.resolve() / family_and_traits(config))
            make(config, folders[-1])
    models = sorted(path.parent for folder in folders for path in folder.glob("*/expected.npy"))
    for runtime, version, command in runtimes_of(asked):
        stem = f"{runtime} {version}"
        ask(models, stem, command)
        write_table(
            Measurement(runtime, version, model.parent.name, model.name, *answer_of(model, stem)) for model in models
        )


def write_table(rows: Iterable[Measurement]) -> None:
    """Put these rows in the place of those about the same cuts in the same runtime."""
    measured.cache_clear()
    kept = {(row.runtime, row.kind, row.cut): row for row in (*measured(), *rows)}
    with runtimes.TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measurement)], lineterminator="\n")
        writer.writeheader()
        for _, row in sorted(kept.items()):
            difference = "" if row.difference is None else f"{row.difference:.2g}"
            writer.writerow({**asdict(row), "difference": difference})
    measured.cache_clear()


def twin_config(family: str, values: dict[str, Any]) -> PretrainedConfig:
    """A config of the family's own class, wide enough for every axis to be cut by itself."""
    wanted: dict[str, Any] = {
        **SIZES,
        "intermediate_size": 320,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in ("gpt2", "gpt_neo", "gpt_neox", "opt"):
        del wanted["num_key_value_heads"]
    if family in ("gpt2", "gpt_neo", "gpt_neox", "opt", "stablelm"):
        del wanted["head_dim"]
    if "num_layers" in values:
        del wanted["num_hidden_layers"]
    if {"n_inner", "ffn_dim"} & {*values}:
        del wanted["intermediate_size"]
    with quiet():
        return AutoConfig.for_model(family, **{**wanted, **values})


# ---- twins


def make(config: PretrainedConfig, folder: Path) -> None:
    """A folder for the twin and one for each cut of it, with the logits that plain transformers computes."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokens = torch.randint(3, 256, (TOKENS,), generator=torch.Generator().manual_seed(1))
    np.save(folder / "tokens.npy", tokens.numpy())
    anatomy = discover(config)
    with quiet():
        twin = random_twin(anatomy, seed=0).float()
    for name, sizes, kept in cuts(anatomy):
        try:
            plan = select(
                anatomy, anatomy.sizes.at(**sizes), RandomScores(anatomy.sizes, 0), gain="none", kept_layers=kept
            )
            save_model(trim(twin, plan, anatomy), folder / name, extra_from=None, record=None)
        except HalveError as error:
            print(f"{folder.name}, {name}: {error}")
            continue
        with torch.no_grad(), quiet():
            plain = AutoModelForCausalLM.from_pretrained(folder / name, dtype="float32", attn_implementation="eager")
            np.save(folder / name / "expected.npy", plain.eval()(input_ids=tokens[None], use_cache=False).logits[0])
    (folder / "done").touch()


def cuts(anatomy: Anatomy) -> Iterator[tuple[str, dict[str, int], Sequence[int] | None]]:
    """Every cut that a row of the table is about: its name, the sizes that differ, the layers that stay."""
    before = anatomy.sizes
    refused = prove(anatomy, reopen=False).refusals
    everything = range(before.layers)
    yield WHOLE, {}, everything
    if "layers" not in refused:
        yield DEPTH_CUT, {"layers": before.layers - 1}, [layer for layer in everything if layer != 2]
        span = period(anatomy)
        if span is not None and 1 < span < before.layers:
            yield IN_PLACE, {"layers": before.layers - span}, everything[span:]
    ungrouped = before.heads == before.kv_heads
    for axis, smaller in SMALL.items():
        if axis in refused or (anatomy.coupled and axis != "ffn") or (ungrouped and axis == "kv_heads"):
            continue
        yield axis, {**smaller, "kv_heads": smaller["heads"]} if ungrouped and axis == "heads" else smaller, everything
    if "hidden" not in refused:
        yield PROPORTION, in_proportion(before), everything


def in_proportion(before: Arch) -> dict[str, int]:
    """Half of hidden and heads, so that hidden = heads x head_dim before and after."""
    heads = before.heads // 2
    kv_heads = heads if before.heads == before.kv_heads else before.kv_heads - 1
    return {"hidden": heads * before.head_dim, "heads": heads, "kv_heads": kv_heads}


# ---- runtimes


def runtimes_of(asked: argparse.Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """Name, version and command of every runtime that was given an interpreter for."""
    if asked.transformers:
        version = _version(asked.transformers, "transformers")
        yield "transformers", version, [asked.transformers, str(READERS / "plain_transformers.py")]
    if asked.vllm:
        yield "vLLM", _version(asked.vllm, "vllm"), [asked.vllm, str(READERS / "plain_vllm.py")]
    if asked.llama_cpp:
        log = (Path(asked.llama_cpp_source) / "CHANGELOG.md").read_text(encoding="utf-8")
        found = re.search(r"ggml-org/llama.cpp@(\w+)", log)
        assert found is not None, "the changelog of llama-cpp-python names the commit of llama.cpp"
        reader = [asked.llama_cpp, str(READERS / "plain_llama_cpp.py"), str(Path(asked.llama_cpp_source).resolve())]
        yield "llama.cpp", found[1], reader


def _version(python: str, package: str) -> str:
    code = f"import {package}; print({package}.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def ask(models: Sequence[Path], stem: str, command: list[str]) -> None:
    """Let a runtime answer for every model that it has not answered for; one that ends the process is its fault."""
    while left := [model for model in models if not _answered(model, stem)]:
        done = subprocess.run(
            [*command, stem, *map(str, left)], capture_output=True, text=True, errors="replace", check=False
        )
        silent = next((model for model in left if not _answered(model, stem)), None)
        if silent is not None:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit {done.returncode}"]
            (silent / f"{stem}.txt").write_text(said[-1])


def _answered(model: Path, stem: str) -> bool:
    return (model / f"{stem}.npy").exists() or (model / f"{stem}.txt").exists()


def answer_of(model: Path, stem: str) -> tuple[float | None, str]:
    """The largest difference, or None and the reason why there is none."""
    if (found := model / f"{stem}.npy").exists():
        return difference(np.load(model / "expected.npy"), np.load(found)), ""
    return None, shortened((model / f"{stem}.txt").read_text())


def difference(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """The largest difference of logits up to a constant a token, in standard deviations of the expected ones.

    A runtime that gives log-probabilities may leave out the last token, and one may pad the vocabulary.
    """
    a = np.asarray(expected[: len(found)], dtype=np.float64)
    b = np.asarray(found[:, : a.shape[1]], dtype=np.float64)
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    return float(np.nan_to_num(np.abs(a - b), nan=np.inf).max() / a.std())


def shortened(reason: str) -> str:
    """One line without paths."""
    line = " ".join(reason.split())
    return re.sub(r"(/[\w.+-]+){2,}/?", "...", line)[:160]


if __name__ == "__main__":
    main()
    print(f"{len(measured())} rows")
