"""What names a token file: a hash of everything that its tokens depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from halve.disk.files import read_sealed, remembering, sealed, write_json
from halve.text import sources as text_sources
from halve.text import tokenize
from halve.text.rendering import Chat
from halve.text.tokenize import Marks

TOKENS_FORMAT = 4


def content_key(
    sources: Sequence[str],
    revisions: Mapping[str, str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    marks: Marks,
    text_field: str,
    chat: Chat | None,
    memo: Path,
) -> str:
    """The hash of the tokens that a tokenizer makes of sources; `revisions` are those of hub data sets."""
    sha256 = remembering(memo)
    parts = {
        "format": TOKENS_FORMAT,
        "sources": [
            text_sources.fingerprint(source, revision=revisions.get(source), sha256=sha256) for source in sources
        ],
        "tokenizer": tokenize.tokenizer_fingerprint(tokenizer),
        "marks": asdict(marks),
        "text_field": text_field,
    }
    if chat is not None:
        parts["chat"] = chat.identity(tokenizer)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pinned_revision(source: str, cache: Path) -> str:
    """The revision of a hub data set that this cache was made with. The first time, the current revision."""
    note = cache / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.hub.json"
    if note.exists():
        return str(read_sealed(note)["revision"])
    revision = text_sources.hub_revision(source)
    write_json(note, sealed({"source": source, "revision": revision}))
    return revision
