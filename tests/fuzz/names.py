"""Names that a file system allows and programs forget: of texts, of the model, of a file beside it."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from halve.recipe import strict_yaml

NAMES = (
    *(b"caf\xe9", b"b.\xe9", b"\xff\xfe.jsonl", b"a.\xff.gz", b"two words", b" ", b"-o", b"--help", b"a" * 255),
    *(b"[red]b[/red]", b"[/]", b"{{ 7 }}", b"{name}", b"%s", b"a\nb", b"a\tb", b"\x1b[31m", b"\\", b"'", b'"', b"<b>"),
    *(
        "\N{GRINNING FACE}".encode(),
        "\N{RIGHT-TO-LEFT OVERRIDE}a".encode(),
        b"#",
        b"a: b",
        b"*",
        b"hub:a",
        b"~",
        b"...",
    ),
)
ENDINGS = (b"", b".jsonl", b".txt", b".JSONL", b".gz", b".parquet", b".csv", b".json")


def spoil(folder: Path, draw: Random) -> None:
    """Rename one part of a world, in the recipe too, as far as a recipe can spell it."""
    recipe = strict_yaml.parse_yaml((folder / "recipe.yaml").read_bytes())
    name = os.fsdecode(draw.choice(NAMES) + draw.choice(ENDINGS))[:255]
    part = draw.choice(["texts", "train", "valid", "model", "outside"])
    if part == "texts":  # a recipe names the folder alone
        (folder / "texts").mkdir()
        _move(folder / "train.jsonl", folder / "texts" / name)
        recipe["data"]["train"] = ["texts"]
    elif part == "model":
        _move(folder / "model", folder / name)
        recipe["model"] = f"./{name}"
    elif part == "outside":  # what the model's folder holds beside the model
        _move(folder / "items.jsonl", folder / "model" / name)
        recipe["evaluate"]["choices"] = []
    else:
        _move(Path(folder, *recipe["data"][part]), folder / name)
        recipe["data"][part] = [f"./{name}"]
    (folder / "recipe.yaml").write_text(strict_yaml.dump(recipe), encoding="utf-8", errors="replace")


def _move(old: Path, new: Path) -> None:
    new.parent.mkdir(exist_ok=True)
    try:
        old.rename(new)
    except OSError:  # longer than a file system allows
        old.rename(new.with_name("a"))
