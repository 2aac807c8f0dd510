"""A client for OpenAI-compatible endpoints: a student that vLLM or llama.cpp serves, or a judge.

It only asks for chat completions. A request may take 60 seconds. Where it fails for a reason that may pass, it is tried
three more times, after 1, 4 and 16 seconds. Finished items are on disk, so that after an error the same command goes
on. A key comes from an environment variable and is written nowhere.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from halve.disk import plain_json
from halve.errors import RunError

TIMEOUT_S = 60.0
WAITS_S = (1.0, 4.0, 16.0)
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
"""Answers of a server after which the same request may succeed."""
_MOST_BYTES = 1 << 24

Message = Mapping[str, str]


@dataclass(frozen=True)
class Endpoint:
    """A served model. `url` ends before `/chat/completions`, as in http://localhost:8000/v1."""

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key. Without it, none is sent."""
    pause: Callable[[float], object] = time.sleep

    def chat(self, messages: Sequence[Message], *, temperature: float, max_tokens: int) -> str:
        """The model's answer to a conversation.

        Raises `RunError` if the endpoint is still down or too slow after the last try, refuses, or answers something
        that is no chat completion.
        """
        asked = {"model": self.model, "messages": [*map(dict, messages)], "temperature": temperature}
        body = json.dumps(asked | {"max_tokens": max_tokens}).encode()
        for wait in (*WAITS_S, None):
            try:
                return self._answer(self._post(body))
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _PASSING or wait is None:
                    raise self._failed(f"it answers {error.code} {error.reason}") from None
            except (OSError, HTTPException) as error:  # also a timeout, and a connection that is cut
                if wait is None:
                    raise self._failed(str(error) or type(error).__name__) from None
            self.pause(wait)
        raise AssertionError("the last try returns or raises")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            said: bytes = reply.read(_MOST_BYTES)
        return said

    def _answer(self, said: bytes) -> str:
        try:
            text = plain_json.parse_json(said)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise self._failed(f"what it answers is no chat completion: {type(error).__name__}: {error}") from None
        if not isinstance(text, str):
            return ""
        # an answer that ends inside an emoji may hold half a surrogate pair, which no file and no page can
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _failed(self, why: str) -> RunError:
        return RunError(
            f"the endpoint {self.url} does not answer for {self.model}",
            why=why,
            fix="start it or correct its address, then run the same command again: finished items are kept",
        )


class KeptItems:
    """Finished items of a file of JSON lines, one for each item. A line that a kill cut short is asked again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._items: dict[str, Any] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                item = plain_json.parse_json(line)
                self._items[item["item"]] = item["value"]
            except (ValueError, KeyError, TypeError):
                continue
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def get(self, item: str, make: Callable[[], Any]) -> Any:
        """The value of an item: the kept one, or a new one, which is on disk before this returns."""
        if item not in self._items:
            self._items[item] = make()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"item": item, "value": self._items[item]}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return self._items[item]
