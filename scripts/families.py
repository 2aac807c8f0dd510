"""Walk every decoder-only family of the installed transformers and write what the proof of each axis found.

    python scripts/families.py              resume the last walk, then write docs/reference/families.md
    python scripts/families.py NAME ...     these families again, then the page

Each family is proved in its own process, with at most 120 seconds and 2 GB of memory. If it needs more, this is its
result. Results are in docs/reference/families.json, each with the fingerprint of the code that found it. A walk skips
families that have a result of the current code.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from halve.anatomy import Anatomy

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = (ROOT / "docs" / "reference" / name for name in ("families.md", "families.json"))
SOURCES = (
    *("anatomy/*.py", "cut/proof/*.py", "cut/surgery/*.py"),
    *("cut/plan/plan.py", "cut/plan/sizes.py", "cut/score/taps.py"),
)
SECONDS, BYTES = 120.0, 2 * 10**9
AXES = ("layers", "hidden", "ffn", "heads", "kv_heads")

# Not families of decoder-only language models, though transformers lists them under causal language models: they
# fill gaps, translate, or read pictures and sounds as well.
OTHER_TASKS = (
    *("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM"),
    *("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
)
# Default configs that the family's own code does not build, or that say nothing of its checkpoints.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "diffllama": {"num_key_value_heads": 8},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 4, "num_hidden_layers": 32},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": (["conv", "conv", "full_attention", "conv"] * 6), "num_hidden_layers": 24},
    "ministral": {"head_dim": 128},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 16,
    },
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
}


def main(arguments: list[str]) -> int:
    """Walk, and give the exit code."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    code = fingerprint()
    wanted = arguments or [name for name in families() if results.get(name, {}).get("code") != code]
    for name in wanted:
        results[name] = {**in_a_process(name), "code": code}
        _write(RESULTS, json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        print(f"{name}: {summary(results[name])}", flush=True)
    _write(PAGE, page(results))
    return 0


def fingerprint() -> str:
    """Of transformers and of the code that decides what a walk finds."""
    import transformers

    digest = hashlib.sha256(transformers.__version__.encode())
    for pattern in SOURCES:
        for path in sorted((ROOT / "src" / "halve").glob(pattern)):
            digest.update(f"{path.name} {code_of(path.read_text(encoding='utf-8'))}".encode())
    return digest.hexdigest()[:16]


def code_of(source: str) -> str:
    """What a module does: its syntax tree without comments, layout and what describes (docstrings, lone texts)."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _describes(one)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _describes(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def families() -> list[str]:
    """By model type, each config class once: wrappers whose text part is a family of its own are left to that one."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    others = {name for task in OTHER_TASKS for name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")}
    found = {}
    for name in names:
        if name not in others:
            try:
                config = AutoConfig.for_model(name)
            except Exception:  # a family's own code may raise anything; the walk then says what
                found[name] = name
                continue
            text = config.get_text_config()
            if text is config or text.model_type not in names:
                found.setdefault(config.model_type, config.model_type)
    return sorted(found)


# ---- one family


def in_a_process(name: str) -> dict[str, Any]:
    """What the proof finds, or what stopped it."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    started, most = time.monotonic(), 0
    child = context.Process(target=_send, args=(name, send))
    child.start()
    send.close()
    stopped = ""
    seconds = 0.0
    while not receive.poll(0.1):
        if not child.is_alive():
            break
        used, resident = _used(child.pid)
        seconds, most = max(seconds, used), max(most, resident)
        if most > BYTES:
            stopped = f"it takes more than {BYTES // 10**9} GB"
        elif seconds > SECONDS or time.monotonic() - started > 10 * SECONDS:
            stopped = f"it takes more than {SECONDS:.0f} seconds"
        if stopped:
            _end(child.pid)
            break
    try:
        result: dict[str, Any] = {"stopped": stopped} if stopped else receive.recv()
    except EOFError:
        result = {"stopped": "its process died"}
    child.join()
    return {**result, "seconds": round(seconds, 1), "gigabytes": round(most / 1e9, 2)}


def _used(pid: int | None) -> tuple[float, int]:
    """Seconds of computing, which a busy machine does not stretch, and bytes of memory."""
    try:
        process = psutil.Process(pid)
        parts = [process, *process.children(recursive=True)]
        times = [time for part in parts for time in part.cpu_times()[:4]]  # own and ended children's, user and system
        return sum(times), sum(part.memory_info().rss for part in parts)
    except psutil.NoSuchProcess:
        return 0.0, 0


def _end(pid: int | None) -> None:
    try:
        process = psutil.Process(pid)
        for part in (*process.children(recursive=True), process):
            part.kill()
    except psutil.NoSuchProcess:
        pass


def _send(name: str, connection: multiprocessing.connection.Connection) -> None:
    connection.send(findings(name))


def findings(name: str) -> dict[str, Any]:
    """The verdict on every axis of a family's default architecture."""
    import torch
    from transformers import AutoConfig

    from halve.anatomy import discover
    from halve.anatomy.configs import quiet
    from halve.cut.proof.causal import check_causal
    from halve.cut.proof.prove import prove
    from halve.errors import HalveError

    torch.set_num_threads(1)  # the twins are tiny: threads would wait for each other
    try:
        with quiet():
            config = AutoConfig.for_model(name, **CHANGES.get(name, {}))
            anatomy = discover(config)
            try:
                check_causal(anatomy)
            except HalveError as error:
                return {"stopped": f"{error.what}: {error.why}", "looks_ahead": True}
            proof = prove(anatomy)
    except HalveError as error:
        return {"stopped": f"{error.what}: {error.why}"}
    except Exception as error:  # a family's own code may raise anything
        return {"stopped": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {
        "coupled": anatomy.coupled,
        "lacks": _lacks(anatomy),
        "refused": {axis: proof.refusals[axis] for axis in AXES if axis in proof.refusals},
    }


def _lacks(anatomy: Anatomy) -> list[str]:
    """The axes that are none of the family's: key-value heads that go with heads, ffn that is a multiple of hidden.

    A family without attention has no heads.
    """
    from halve.anatomy.configs import has_heads

    sums = [expr for shape in anatomy.params.values() for expr in shape]
    fixed = any(len(expr.terms) > 3 and {*expr.terms} == {("hidden",)} for expr in sums)
    lacks_ffn = fixed and not any("ffn" in expr.axes for expr in sums)
    lacks_heads = not has_heads(anatomy.config)
    found = {"ffn": lacks_ffn, "heads": lacks_heads, "kv_heads": lacks_heads or not anatomy.grouped}
    return [axis for axis, lacks in found.items() if lacks]


# ---- what is made of the findings


def summary(result: Mapping[str, Any]) -> str:
    """One line."""
    told = result.get("stopped") or "; ".join(f"{a}: {why}" for a, why in result["refused"].items()) or "every axis"
    return f"{told} ({result['seconds']} s, {result['gigabytes']} GB)"


def cells(result: Mapping[str, Any]) -> dict[str, str]:
    """By axis: yes, no, what it is cut together with, or nothing where the family has no such axis."""
    if "stopped" in result:
        return dict.fromkeys(AXES, "no")
    together = {"hidden": "with heads", "heads": "with hidden"} if result["coupled"] else {}
    found = {axis: "no" if axis in result["refused"] else together.get(axis, "yes") for axis in AXES}
    return {axis: "" if axis in result["lacks"] else cell for axis, cell in found.items()}


def refused(result: Mapping[str, Any]) -> list[str]:
    """The axes of the family that are not proved; of one that is, none."""
    return [axis for axis, cell in cells(result).items() if cell == "no"]


def _of_experts(result: Mapping[str, Any]) -> bool:
    return str(result.get("refused", {}).get("ffn", "")).startswith("a mixture of")


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table, and the failing check of every axis that is refused.

    Left out are results of what is no family any more, and families whose default architecture looks ahead.
    """
    known = families()
    ahead = [name for name in known if results.get(name, {}).get("looks_ahead")]
    results = {name: results[name] for name in known if name in results and name not in ahead}
    nothing = [name for name, result in results.items() if not {"yes", "with heads"} & set(cells(result).values())]
    whole = [name for name, result in results.items() if not refused(result)]
    but_experts = [name for name, result in results.items() if set(refused(result)) == {"ffn"} and _of_experts(result)]
    rows, notes = [], []
    for name, result in results.items():
        rows.append(f"| {' | '.join([name, *cells(result).values()])} |")
        reasons: dict[str, list[str]] = {"stopped": []} if "stopped" in result else {}
        for axis, reason in result.get("refused", {}).items():
            if cells(result)[axis] == "no":
                reasons.setdefault(reason, []).append(axis)
        notes += [
            f"- `{name}`: {' and '.join(axes) + ': ' if axes else ''}{_text(result['stopped'] if not axes else reason)}"
            for reason, axes in reasons.items()
        ]
    table = "\n".join([f"| {' | '.join(['family', *AXES])} |", "|---" * (len(AXES) + 1) + "|", *rows])
    return (
        "<!-- Generated by scripts/families.py; edits here are lost. -->\n\n# Families\n\n"
        f"Of the {len(results)} families of decoder-only language models walked so far, {len(whole)} can be cut along"
        f" every axis that they have, {len(but_experts)} more along every axis but the neurons of their experts,"
        f" {len(results) - len(whole) - len(but_experts) - len(nothing)} along some, {len(nothing)} along none.\n\n"
        "Each cell is the result of a proof on random twins of the family's default architecture (see"
        f" [axes and proof](../concepts/axes-and-proof.md)), within {SECONDS:.0f} seconds and {BYTES // 10**9} GB. For"
        " a given model, its own proof decides: `halve inspect MODEL`. Part of the proof is that transformers opens the"
        " student. Other programs were [measured](runtimes.md).\n\n"
        "- *with heads*, *with hidden*: the family's code computes head_dim as hidden / heads, so the two axes are cut"
        " together.\n"
        "- An empty cell under kv_heads: every query head has its own key-value head, which is cut with it.\n"
        "- An empty cell under ffn: the code makes ffn a multiple of hidden, so it is cut with hidden.\n"
        "- An empty cell under heads: the family has no attention.\n\n"
        "Two kinds of families are left out: those that transformers also lists under other tasks, such as filling gaps"
        " or reading images, and those whose default architecture is not causal"
        f" ({', '.join(ahead) or 'none so far'}).\n\n"
        f"{table}\n\n## Why not\n\n" + "\n".join(notes) + "\n"
    )


def _text(reason: str) -> str:
    """A reason that a Markdown list can hold."""
    return " ".join(reason.split()).replace("<", "&lt;").replace("*", "\\*")


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    # imported once, before the walk forks: a family's process then starts with everything at hand
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import halve.cut.proof.prove  # noqa: F401

    sys.exit(main(sys.argv[1:]))
