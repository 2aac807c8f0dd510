"""Make a Hugging Face language model smaller and keep what it knows.

>>> import halve
>>> from transformers import LlamaConfig
>>> anatomy = halve.discover(LlamaConfig())
>>> print(anatomy.sizes)
layers 32, hidden 4096, ffn 11008, heads 32/32 x 128, vocab 32000
>>> anatomy.ledger.count(anatomy.sizes.at(hidden=3072, ffn=8192)).params
4223339520

Names are imported when they are first used, so `import halve` alone does not import torch.
"""

import sys

if (
    sys.argv[:1] == ["-m"]
    and not sys.flags.safe_path
    and any(word.removeprefix("-m").partition(".")[0] == "halve" for word in sys.orig_argv)
):
    # `python -m halve` looks for every module in the working folder first, which may hold someone's torch.py
    sys.path[:] = [entry for entry in sys.path if entry not in ("", ".", sys.path[0])]

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halve.anatomy import Anatomy, Arch, discover
    from halve.cut.plan.plan import Plan, select
    from halve.cut.proof.prove import Proof, prove
    from halve.cut.score.scores import Scores
    from halve.cut.surgery.trim import trim
    from halve.errors import HalveError
    from halve.model.checkpoint import Checkpoint, load_config
    from halve.pipeline.run import check, run
    from halve.preflight.forecast import forecast
    from halve.recipe.read import load_recipe
    from halve.recipe.schema import Recipe

__version__ = "0.1.0"

# An optional package, torchao, logs at import which of its GPU kernels do not fit this machine. This is noise here.
for _talker in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_talker).setLevel(logging.ERROR)

__all__ = [
    "Anatomy",
    "Arch",
    "Checkpoint",
    "HalveError",
    "Plan",
    "Proof",
    "Recipe",
    "Scores",
    "__version__",
    "check",
    "discover",
    "forecast",
    "load_config",
    "load_recipe",
    "prove",
    "run",
    "select",
    "trim",
]

# Where each name lives, and what it is called there.
_HOMES = {
    "Anatomy": ("halve.anatomy", "Anatomy"),
    "Arch": ("halve.anatomy", "Arch"),
    "Checkpoint": ("halve.model.checkpoint", "Checkpoint"),
    "HalveError": ("halve.errors", "HalveError"),
    "Plan": ("halve.cut.plan.plan", "Plan"),
    "Proof": ("halve.cut.proof.prove", "Proof"),
    "Recipe": ("halve.recipe.schema", "Recipe"),
    "Scores": ("halve.cut.score.scores", "Scores"),
    "check": ("halve.pipeline.run", "check"),
    "discover": ("halve.anatomy", "discover"),
    "forecast": ("halve.preflight.forecast", "forecast"),
    "load_config": ("halve.model.checkpoint", "load_config"),
    "load_recipe": ("halve.recipe.read", "load_recipe"),
    "prove": ("halve.cut.proof.prove", "prove"),
    "run": ("halve.pipeline.run", "run"),
    "select": ("halve.cut.plan.plan", "select"),
    "trim": ("halve.cut.surgery.trim", "trim"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'halve' has no attribute {name!r}")
    module, own_name = _HOMES[name]
    value = globals()[name] = getattr(import_module(module), own_name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
