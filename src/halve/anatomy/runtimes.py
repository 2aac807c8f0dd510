"""Which runtimes open a cut model, said before it is cut.

Read off vLLM 0.33.0 and llama.cpp of October 2026 for families whose code lets head_dim differ from hidden / heads
("decoupled"); transformers 5 is not taken from a table: the proof reopens a twin in it. A family that is not listed is
said to be unknown. This file and `quirks.py` are the only ones that name families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from halve.anatomy.arch import Arch
from halve.anatomy.discover import Anatomy

Verdict = Literal["yes", "no", "unknown"]

_VLLM: Mapping[str, Verdict] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"), "yes"),
    **dict.fromkeys(("granite", "glm4", "apertus", "phi3", "nemotron", "cohere", "cohere2", "exaone4"), "yes"),
    # through vLLM's Transformers backend
    **dict.fromkeys(("arcee", "seed_oss", "smollm3", "olmo2", "olmo3", "starcoder2", "phi"), "yes"),
    **dict.fromkeys(("qwen2", "qwen2_moe"), "no"),
}
_LLAMA_CPP: Mapping[str, Verdict] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"), "yes"),
    **dict.fromkeys(("granite", "glm4", "arcee", "seed_oss", "smollm3", "apertus"), "yes"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "phi3", "nemotron", "olmo2", "olmo3", "starcoder2", "phi"), "no"),
    **dict.fromkeys(("cohere", "cohere2", "exaone4"), "no"),
}


@dataclass(frozen=True)
class Runtime:
    """Whether a runtime opens the result, and what would make it."""

    name: str
    opens: Verdict
    remedy: str = ""


def runtimes(anatomy: Anatomy, after: Arch) -> tuple[Runtime, ...]:
    """The verdict of transformers, vLLM and llama.cpp on a model of this family cut to these sizes."""
    decoupled = after.hidden != after.heads * after.head_dim
    listed = anatomy.family in _VLLM or anatomy.coupled
    found = [Runtime("transformers", "yes")]
    for name, table in (("vLLM", _VLLM), ("llama.cpp", _LLAMA_CPP)):
        if not decoupled:
            verdict: Verdict = "yes" if listed else "unknown"
        else:
            verdict = table.get(anatomy.family, "unknown")
        found.append(Runtime(name, verdict, _remedy(anatomy, after) if verdict != "yes" and decoupled else ""))
    return tuple(found)


def _remedy(anatomy: Anatomy, after: Arch) -> str:
    hidden = after.heads * after.head_dim
    legal = hidden <= anatomy.sizes.hidden
    other = f"--hidden {hidden} (= heads x head_dim)" if legal else "fewer heads"
    groups = anatomy.sizes.kv_heads
    heads = after.hidden // after.head_dim // groups * groups
    if after.hidden % after.head_dim == 0 and heads * after.head_dim == after.hidden and heads:
        other = f"--heads {heads} (hidden = heads x head_dim), or {other}"
    return f"{other}; or cut only ffn and layers"
