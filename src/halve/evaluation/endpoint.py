"""A client for OpenAI-compatible endpoints: a student that vLLM or llama.cpp serves, or a judge.

It only asks for chat completions. A request may take 60 seconds. Where it fails for a reason that may pass, it is tried
three more times, after 1, 4 and 16 seconds. Finished items are on disk, so that after an error the same command goes
on. A key comes from an environment variable, is written nowhere, and goes only to the address that was given: a
redirect is an error.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from halve.disk import plain_json
from halve.disk.textfiles import half_pair, reason, require_file, shown
from halve.errors import RunError

TIMEOUT_S = 60.0
WAITS_S = (1.0, 4.0, 16.0)
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
"""Answers of a server after which the same request may succeed."""
_MOST_BYTES = 1 << 24
_PATH = "/chat/completions"

Message = Mapping[str, str]


@dataclass(frozen=True)
class Endpoint:
    """A served model. `url` ends before `/chat/completions`, as in http://localhost:8000/v1.

    Raises `RunError` for an address, a name or a key with which no request can be sent.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key. Without it, none is sent."""
    pause: Callable[[float], object] = time.sleep

    def __post_init__(self) -> None:
        if half_pair(self.model) is not None:
            raise RunError(
                f"cannot ask for the model {self.model!a}",
                why="its name is not UTF-8",
                fix="give the name that the endpoint lists under /models",
            )
        if why := _no_address(self.url):
            raise RunError(
                # what stands before an @ may be a password
                f"cannot ask {self.model} at the address {re.sub('//.*@', '//...@', self.url)[:200]!r}",
                why=why,
                fix="give an address such as http://localhost:8000/v1; a key belongs in an environment variable",
            )
        _key(self.key_variable)

    def chat(self, messages: Sequence[Message], *, temperature: float, max_tokens: int) -> str:
        """The model's answer to a conversation.

        Raises `RunError` if the endpoint is still down or too slow after the last try, refuses, points to another
        address, or answers something that is no chat completion.
        """
        asked = {"model": self.model, "messages": [*map(dict, messages)], "temperature": temperature}
        body = json.dumps(asked | {"max_tokens": max_tokens}).encode()
        for wait in (*WAITS_S, None):
            try:
                return self._answer(self._post(body))
            except urllib.error.HTTPError as error:
                error.close()
                if 300 <= error.code < 400 and (location := error.headers.get("Location")):
                    raise self._elsewhere(error.code, location) from None
                if error.code not in _PASSING or wait is None:
                    raise self._failed(f"it answers {error.code} {error.reason}") from None
            except (OSError, HTTPException) as error:  # also a timeout, and a connection that is cut
                if wait is None:
                    raise self._failed(str(error) or type(error).__name__) from None
            self.pause(wait)
        raise AssertionError("the last try returns or raises")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := _key(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._place(), data=body, headers=headers)
        with _opener().open(request, timeout=TIMEOUT_S) as reply:
            said: bytes = reply.read(_MOST_BYTES)
        return said

    def _place(self) -> str:
        return f"{self.url.rstrip('/')}{_PATH}"

    def _answer(self, said: bytes) -> str:
        try:
            text = plain_json.parse_json(said)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise self._failed(f"what it answers is no chat completion: {type(error).__name__}: {error}") from None
        if not isinstance(text, str):
            return ""
        # an answer that ends inside an emoji may hold half a surrogate pair, which no file and no page can
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _elsewhere(self, code: int, location: str) -> RunError:
        with suppress(ValueError):  # what a server writes may be no address
            location = urljoin(self._place(), location)
        return RunError(
            f"the endpoint {self.url} points to another address for {self.model}",
            why=f"it answers {code} and points to {location}; no redirect is followed, or the key would go there too",
            fix=f"if you trust that address, give it instead of {self.url}: {location.removesuffix(_PATH)}",
        )

    def _failed(self, why: str) -> RunError:
        return RunError(
            f"the endpoint {self.url} does not answer for {self.model}",
            why=why,
            fix="start it or correct its address, then run the same command again: finished items are kept",
        )


def _no_address(url: str) -> str | None:
    """Why a text is no address of an endpoint; None if it is one.

    >>> _no_address("https://api.example.com/v1")
    >>> _no_address("localhost:8000/v1")
    'it does not begin with http:// or https://'
    """
    if not _is_plain(url) or " " in url:
        return "it holds a space or a character that is no printable ASCII"
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "").encode("idna")
    except ValueError as error:
        return str(error)
    wrongs = {
        "it does not begin with http:// or https://": parts.scheme not in ("http", "https"),
        "it names no host": not host,
        "0 is no port": port == 0,
        "it holds a user name or a password": "@" in parts.netloc,
        f"{_PATH} is added to it, so that it cannot hold ? or #": "?" in url or "#" in url,
    }
    return next((why for why, wrong in wrongs.items() if wrong), None)


def _key(variable: str) -> str:
    """The key in an environment variable, without white space around it; "" if there is none.

    Raises `RunError`, which does not show the key, if no header can hold it.
    """
    key = os.environ.get(variable, "").strip()
    if not _is_plain(key):
        place = next(i for i, char in enumerate(key, 1) if not _is_plain(char))
        raise RunError(
            f"the key in the environment variable {variable} cannot be sent",
            why=f"its character {place} of {len(key)} is no printable ASCII, which is all that a header holds",
            fix=f"set {variable} to the key alone",
        )
    return key


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect to who asked. Python would send the key on to whatever host the redirect names."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirects)


class KeptItems:
    """Finished items of a file of JSON lines, one for each item. A line that a kill cut short is asked again.

    `sound` says whether a value can be one of these items. Raises `RunError` for a file that is not one of them.
    """

    def __init__(self, path: Path, sound: Callable[[Any], bool]) -> None:
        self.num_reused = 0
        """The items that `get` found in the file."""
        self._path = path
        self._items: dict[str, Any] = {}
        text = self._text()
        for number, line in enumerate(text.split("\n"), 1):
            try:
                kept = plain_json.parse_json(line)
            except ValueError:
                continue
            if not isinstance(kept, dict) or not isinstance(kept.get("item"), str) or not sound(kept.get("value")):
                raise self._foreign(f"its line {number} is no item that this command wrote")
            self._items[kept["item"]] = kept["value"]
        # a folder that cannot be written to is known before the first item is asked
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            if text and not text.endswith("\n"):
                file.write("\n")

    def __len__(self) -> int:
        return len(self._items)

    def get(self, item: str, make: Callable[[], Any]) -> Any:
        """The value of an item: the kept one, or a new one, which is on disk before this returns."""
        if item in self._items:
            self.num_reused += 1
        else:
            self._items[item] = make()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"item": item, "value": self._items[item]}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return self._items[item]

    def _text(self) -> str:
        try:
            require_file(self._path)
            return self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise self._foreign(reason(error)) from error

    def _foreign(self, why: str) -> RunError:
        return RunError(
            f"cannot go on from {shown(self._path)}",
            why=why,
            fix="move that file away, and its items are asked again; or give another folder with --out",
        )
