"""The short model card in every model folder that halve writes. The report stage writes a long one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from halve.disk.gguf_header import is_gguf
from halve.recipe import strict_yaml

CARD = "README.md"
_LICENSE = ("license", "license_name", "license_link")
_FRONT_CHARS = 1 << 16
_DONE = {
    "dequantize": "read from a GGUF file and dequantized to bfloat16",
    "correct": "adapted to a corpus by fine-tuning with cross-entropy",
    "prune": "pruned, and not yet distilled: expect it to be much worse than its base model",
    "distill": "pruned and distilled from its base model",
    "align": "pruned, distilled from its base model and aligned",
}

DEQUANTIZED = "The base model {} is a GGUF file. It was dequantized to bfloat16 first, so it has that file's rounding."


def made_in_words(made: Mapping[str, Any]) -> str:
    """Which student a cut kept, and in which basis hidden was cut, from the `made` of a plan.

    >>> made_in_words({"cut": "refit", "compared": {}, "rotation": "pca", "unrotated": ""})
    'The weights around the cut were refit. hidden was cut along the principal axes of the residual stream.'
    """
    words = "The weights around the cut were refit." if made["cut"] == "refit" else "The kept weights are unchanged."
    if compared := made["compared"]:
        refit_kls = {key: compared[key] for key in ("refit_kl", "unrotated_kl") if key in compared}
        refit_kl, plain_kl = min(refit_kls.values()), compared["plain_kl"]
        mine, its = ("refit student", refit_kl), ("plain cut", plain_kl)
        (kept, kl), (other, other_kl) = (mine, its) if made["cut"] == "refit" else (its, mine)
        words = (
            f"The {kept} was kept: its KL to the teacher is {kl:.3g} nats per token on"
            f" {compared['compared_tokens']:,} calibration tokens that were not fitted, and that of the {other}"
            f" of the same sizes {other_kl:.3g}."
        )
    if made["rotation"] == "pca":
        words += " hidden was cut along the principal axes of the residual stream."
    elif made["unrotated"]:
        words += f" hidden was cut in the model's own basis: {made['unrotated']}."
    return words


def name_of(source: str | Path) -> str:
    """The name of a model outside this machine: a hub name, or the last part of a folder's path."""
    return Path(source).name if Path(source).exists() else str(source)


def license_of(folder: Path) -> dict[str, str]:
    """The license of a model folder by its card: license, license_name and license_link, if they are there.

    Read line by line, because the rest of a card may not be valid YAML.
    """
    try:
        with (folder / CARD).open(encoding="utf-8", errors="replace") as file:
            front = file.read(_FRONT_CHARS).replace("\r\n", "\n").removeprefix("\ufeff")
    except OSError:
        return {}
    terms: dict[str, str] = {}
    for line in front.split("\n---", 1)[0].splitlines() if front.startswith("---\n") else ():
        key = line.partition(":")[0]
        if key in _LICENSE:
            with suppress(yaml.YAMLError):
                value = strict_yaml.parse_yaml(line).get(key)
                terms |= {key: value} if isinstance(value, str) else {}
    return terms


def model_card(record: Mapping[str, Any], *, license: Mapping[str, str] | None = None) -> str:
    """A README.md with front matter, made from `halve.json`: `stage`, `base_model` and, if the model was cut, `plan`.

    The license is the original model's.

    >>> print(model_card({"stage": "prune", "base_model": "owner/name"}).splitlines()[1])
    base_model: owner/name
    """
    base = str(record.get("base_model", "unknown"))
    front = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["halve", str(record.get("stage"))],
        **(license or {}),
    }
    itself = record.get("stage") == "dequantize"
    title = f"{base}, {'dequantized' if itself else 'made smaller'}"
    lines = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", "", f"# {title}", ""]
    lines.append(f"A model {_DONE.get(str(record.get('stage')), 'written')} by halve. `halve.json` says how.")
    if is_gguf(base) and not itself:
        lines += ["", DEQUANTIZED.format(base)]
    if plan := record.get("plan"):
        lines += ["", "| axis | before | after |", "|---|---|---|"]
        lines += [f"| {axis} | {plan['before'][axis]} | {plan['after'][axis]} |" for axis in plan["before"]]
        if made := plan.get("made"):
            lines += ["", made_in_words(made)]
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "```",
        "",
    ]
    return "\n".join(lines)
