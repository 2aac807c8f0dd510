"""A GGUF file as a teacher: what its header says, and the ordinary model folder that is made of it once.

Planning needs the header alone. Whoever needs weights gets a folder of safetensors in bfloat16, named by the hash of
the file: another file makes another folder, and a run that resumes finds its own.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from halve.disk.files import alone, content_hashes, disk_guard, file_sha256, read_object
from halve.disk.gguf_header import GgufHeader, locate_gguf, read_header
from halve.disk.rundir import HASHES
from halve.disk.soundness import CONFIG
from halve.errors import RunError
from halve.model import saving
from halve.model.card import CARD
from halve.model.gguf.config import config_of, require_package
from halve.model.gguf.tokenizer import save_tokenizer
from halve.process.waits import bytes_in_words, wait

_FORMAT = 2
"""Of what is made: a change of how it is made gives other folders."""
_LICENSE = {
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
}


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A GGUF file; what it holds is read when it is first asked for, and then kept."""

    path: Path
    home: Path | None
    """Where the folder is made; None is a temporary folder that goes when nobody needs it any more."""

    @classmethod
    def open(cls, source: str | Path, *, home: Path | None) -> GgufFile:
        """Find a file. Raises `CheckpointError`."""
        return cls(locate_gguf(source), home)

    @cached_property
    def header(self) -> GgufHeader:
        """What the file says before its data. Raises `CheckpointError`, also without the package gguf."""
        require_package(self.path)
        return read_header(self.path)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's config. Raises `CheckpointError`."""
        header = self.header
        from halve.model.gguf import weights  # which imports the package

        weights.require_whole(header)
        return config_of(header)

    @cached_property
    def shell(self) -> Path:
        """A temporary folder with config, tokenizer and license, without weights. Raises `TokenizerError`."""
        folder = self._scratch / "shell"
        with disk_guard(folder):
            folder.mkdir()
            save_tokenizer(self.header, folder)
            self.config.save_pretrained(folder)
            named = {key: self.header.values.get(name) for name, key in _LICENSE.items()}
            terms = {key: value for key, value in named.items() if isinstance(value, str)}
            (folder / CARD).write_text(f"---\n{yaml.safe_dump(terms)}---\n", encoding="utf-8")
        return folder

    @cached_property
    def folder(self) -> Path:
        """The model as safetensors; it is made where it is not there yet, whole or not at all.

        Raises `CheckpointError`, `TokenizerError` and `DiskError`.
        """
        folder = (self.home or self._scratch) / f"gguf-{self.sha256[:16]}"
        with alone(folder.with_name(f".{folder.name}.lock")):  # a run that shares `home` may want it as well
            if not (folder / CONFIG).is_file() or not self.made_of.items() <= _noted(folder).items():
                self._make(folder)
        return folder

    @cached_property
    def sha256(self) -> str:
        """The hash of the file."""
        if self.home is None:
            return file_sha256(self.path)
        return content_hashes([self.path], memo=self.home / HASHES)[0]

    @property
    def made_of(self) -> dict[str, Any]:
        """What the folder depends on: the file's hash and the way in which this version reads it."""
        return {"sha256": self.sha256, "format": _FORMAT}

    def require_weights(self) -> None:
        """Raise `CheckpointError` unless the file holds the model's tensors, all and no other, by its header."""
        config = self.config
        from halve.model.gguf import weights

        weights.require_model(self.header, config)

    def _make(self, folder: Path) -> None:
        self.require_weights()
        from halve.model.gguf import weights

        with wait(f"dequantizing {self.path.name} ({bytes_in_words(self.path.stat().st_size)})"):
            model = weights.dequantized(self.header, self.config)
            record = {
                "stage": "dequantize",
                "base_model": self.path.name,
                "gguf": {**self.made_of, "kinds": weights.quantizations(self.header)},
            }
            saving.save_model(model, folder, extra_from=self.shell, record=record)

    @cached_property
    def _scratch(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="halve-gguf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder


def _noted(folder: Path) -> dict[str, Any]:
    """What the folder says that it was made of; nothing where that cannot be read."""
    with suppress(RunError):
        noted = read_object(folder / saving.RECORD).get("gguf")
        return noted if isinstance(noted, dict) else {}
    return {}
