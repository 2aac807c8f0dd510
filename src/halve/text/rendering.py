"""Conversations as tokens: the tokenizer's own chat template writes them, and says which part is the assistant's.

A conversation in a token file is a number a token: its id, whether it begins a conversation (`FIRST`), and whether it
counts (`COUNTED`). The first token of a conversation never counts: nothing predicts it.

Like `tokenize`, this is imported by tokenizing processes and does without torch.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from halve.errors import CorpusError, HalveError, TokenizerError
from halve.process.limits import computing
from halve.recipe.schema import Data
from halve.text.conversations import BESIDE, MESSAGES_KEY, TOOLS, conversation, says_nothing
from halve.text.day import DAY, asks_for_today, fixed_day
from halve.text.rows import Piece, Wanted
from halve.text.spans import Render, TextSpan, assistant_spans
from halve.text.tokenize import EncodedPieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST: Final = 1 << 31
COUNTED: Final = 1 << 30
IDS: Final = COUNTED - 1
CODES: Final = np.dtype(np.uint32)

_CALLS = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Under one of these names a template reads what a message holds under any of them."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LONGEST_RENDERING_S = 10.0
"""Of computing. A conversation of a thousand turns takes milliseconds."""

_FORMAT = 3
"""Of which tokens count, for files of tokens that were made before."""


_Written = TypeVar("_Written")


@dataclass(frozen=True)
class Chat:
    """How conversations are read: from which field, and which of their tokens count."""

    field: str
    count: Literal["assistant", "all"]
    key: str = MESSAGES_KEY
    """The recipe's key that names the field."""

    @classmethod
    def of(cls, data: Data, *, plain: bool = False) -> Chat | None:
        """That of a recipe; None where its text, or a part that is `plain`, is no conversations."""
        return None if plain or data.messages_field is None else cls(data.messages_field, data.count)

    @property
    def wanted(self) -> Wanted:
        """What rows are read for."""
        make = conversation if self.key == MESSAGES_KEY else partial(conversation, key=self.key)
        return Wanted(self.field, self.key, BESIDE, make)

    def identity(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What their tokens depend on beside text and tokenizer, as plain data."""
        template = template_of(tokenizer, self.key)
        what = {"field": self.field, "count": self.count, "template": template, "day": DAY, "format": _FORMAT}
        return what | ({"today": DAY} if asks_for_today(template) else {})  # files of the others keep their names


def template_of(tokenizer: PreTrainedTokenizerBase, key: str) -> Any:
    """A tokenizer's chat templates: one, or several by name. Raises `TokenizerError` where it has none.

    `key` is the recipe's key that needs one.
    """
    template = tokenizer.chat_template
    if not template:
        raise TokenizerError(
            "the tokenizer has no chat template",
            why=f"{key} needs one: it says how conversations are written",
            fix="use a chat model, or put its chat_template.jinja into the folder of the model (not for a GGUF file)",
        )
    return template


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """What a chat model reads before it answers a user's message. Raises `TokenizerError`."""
    template_of(tokenizer, "evaluate.chat_prompts")
    try:
        text = renderer(tokenizer, None)([{"role": "user", "content": prompt}], prompted=True)
    except Exception as error:  # a template may raise whatever Jinja and Python raise
        raise TokenizerError(
            f"the chat template cannot be rendered for the prompt {prompt[:40]!r}",
            why=_reason(error),
            fix="correct the chat template, or set evaluate.chat_prompts: []",
        ) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Any], answers: Sequence[Any], *, tools: Any, place: str
) -> tuple[list[int], list[list[int]]]:
    """The ids of a prompt, which ends where the assistant is invited to answer, and those of each answer to it.

    `tools` are those that the assistant may call, or None. Prompt and answer are tokenized together. The prompt ends
    where its ids and those of any whole part, as one token may hold the end of a prompt and the beginning of an answer.
    Raises `TokenizerError` without a template and `CorpusError` for messages that it cannot render, or of which it
    would leave something out.
    """
    template_of(tokenizer, "align")
    render = renderer(tokenizer, tools)
    try:
        _require_written(tokenizer.get_chat_template(None, tools), [*prompt, *answers], tools, place)

        def write(spoken: Sequence[Any]) -> list[str]:
            asked, said = spoken[: len(prompt)], spoken[len(prompt) :]
            return [render(asked, prompted=True), *(render([*asked, answer]) for answer in said)]

        texts = _with_objects(write, [*prompt, *answers])
    except HalveError:
        raise
    except Exception as error:  # a template may raise whatever Jinja and Python raise
        raise CorpusError(
            f"{place}: the chat template cannot be rendered",
            why=_reason(error),
            fix="correct or drop that row, or the template of the model",
        ) from error
    invited, *whole = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    begin = sum(1 for _ in takewhile(lambda alike: len({*alike}) == 1, zip(invited, *whole, strict=False)))
    return invited[:begin], [ids[begin:] for ids in whole]


def encode_conversations(batch: Sequence[Piece], *, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> EncodedPieces:
    """The numbers of conversations as they stand in a token file, and the UTF-8 bytes of what was rendered.

    Raises `CorpusError` naming the row for one that the template cannot render, and for one whose assistant's part
    cannot be told; `TokenizerError` for a tokenizer without a template, or one that cannot tell where tokens are.
    """
    template_of(tokenizer, chat.key)
    if chat.count == "assistant" and not tokenizer.is_fast:
        raise TokenizerError(
            "the tokenizer cannot tell which tokens are the assistant's",
            why="it is a slow one, which does not say where in the text its tokens are",
            fix="set data.count: all, or use a model with a tokenizer.json",
        )
    rows, text_bytes, largest = [], 0, 0
    for piece in batch:
        text, ids, counts = _encoded(piece, tokenizer, chat)
        codes = np.array(ids, dtype=CODES) | np.where(counts, COUNTED, 0).astype(CODES)
        codes[:1] = codes[:1] & IDS | FIRST
        rows.append(codes.tobytes())
        text_bytes += len(text.encode(errors="replace"))
        largest = max(largest, max(ids, default=0))
    return EncodedPieces(b"".join(rows), text_bytes, largest)


def _encoded(piece: Piece, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[str, list[int], NDArray[np.bool_]]:
    """The rendered text of a conversation, its ids, and which of them count."""
    held = json.loads(piece.text)
    messages, tools = held["messages"], held.get(TOOLS)
    try:
        template = tokenizer.get_chat_template(None, tools)
        _require_written(template, messages, tools, piece.place)
        render = renderer(tokenizer, tools)
        text, messages = _with_objects(lambda spoken: (render(spoken), spoken), messages)
        _require_all(render, messages, text, piece.place)
        if chat.count == "all":
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return text, ids, np.ones(len(ids), dtype=np.bool_)
        marked = _MARKED.search(template) is not None
        if marked:
            spans = _marked_spans(tokenizer, template, tools, messages)
        else:
            spans = assistant_spans(render, messages, text, piece.place)
        made = _placing(tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except HalveError:
        raise
    except Exception as error:  # a template may raise whatever Jinja and Python raise
        raise CorpusError(
            f"{piece.place}: the chat template cannot be rendered",
            why=_reason(error),
            fix="correct or drop that row, or the template of the model",
        ) from error
    begins_S, ends_S = np.array(made["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    counts_S = np.zeros(len(begins_S), dtype=np.bool_)
    for begin, end in spans:  # a token across the beginning counts where the template's own mark is there
        counts_S |= ((begin < ends_S) if marked else (begin <= begins_S)) & (begins_S < end) & (begins_S < ends_S)
    return text, made["input_ids"], counts_S


def _placing(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that says of every token where it is. One that trims does not place a token of spaces.

    Trimming is of the post-processor, which also adds special tokens. None are added here, so ids stay without it.
    """
    processor = tokenizer.backend_tokenizer.post_processor  # a slow tokenizer has none, and was refused
    if processor is None or not _trims(json.loads(processor.__getstate__())):
        return tokenizer
    if tokenizer not in _PLACING:
        _PLACING[tokenizer] = copy.deepcopy(tokenizer)
        _PLACING[tokenizer].backend_tokenizer.post_processor = None
    return _PLACING[tokenizer]


_PLACING: WeakKeyDictionary[PreTrainedTokenizerBase, PreTrainedTokenizerBase] = WeakKeyDictionary()


def _trims(processor: Any) -> bool:
    if isinstance(processor, dict):
        return processor.get("trim_offsets", False) is True or any(map(_trims, processor.values()))
    return isinstance(processor, list) and any(map(_trims, processor))


def _marked_spans(
    tokenizer: PreTrainedTokenizerBase, template: str, tools: Any, messages: Sequence[Any]
) -> list[TextSpan]:
    """Where in the rendered text the template's own marks are."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with computing(_LONGEST_RENDERING_S), fixed_day():
        _, (spans,) = render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, "date_string": DAY},
        )
    return list(spans)


def _require_written(template: str, messages: Sequence[Any], tools: Any, place: str) -> None:
    """What a template does not know of, it would leave out without a word."""
    if tools and TOOLS not in template:
        raise CorpusError(
            f"{place}: the chat template does not write tools",
            why=f"the row has {TOOLS} that the assistant may call, and the template never mentions them",
            fix=f"leave the field {TOOLS!r} out, or use a model whose template writes them",
        )
    for message in messages:
        for calls in _CALLS:
            if message.get(calls) and calls not in template:
                raise CorpusError(
                    f"{place}: the chat template does not write calls of tools",
                    why=f"a message has {calls}, and the template never mentions them",
                    fix="drop rows with calls of tools, or use a model whose template writes them",
                )
        thought = [name for name in _REASONING if message.get(name)]
        if thought and says_nothing({**message, **dict.fromkeys(_REASONING)}) and not _mentions(template, _REASONING):
            raise CorpusError(
                f"{place}: the chat template does not write reasoning",
                why=f"a message has {thought[0]} and nothing else, and the template never mentions it",
                fix="write the answer as content, drop the row, or use a model whose template writes reasoning",
            )


def _require_all(render: Render, messages: Sequence[Any], text: str, place: str) -> None:
    """Raise `CorpusError` for a message that the template passes over, such as one of a role that it does not know."""
    for number, message in enumerate(messages):
        content = message.get("content")
        if not content or (isinstance(content, str) and content.strip() in text):
            continue
        try:
            lost = render([*messages[:number], *messages[number + 1 :]]) == text
        except Exception:  # a template that misses it, such as in the order of user and assistant
            lost = False
        if lost:
            raise CorpusError(
                f"{place}: the chat template leaves a message out",
                why=f"the conversation reads the same without message {number + 1}, of role {message['role']}",
                fix="drop that message, or use a model whose template writes it",
            )


def _mentions(template: str, names: Sequence[str]) -> bool:
    return any(name in template for name in names)


def _with_objects(write: Callable[[Sequence[Any]], _Written], messages: Sequence[Any]) -> _Written:
    """What is written of messages whose calls have objects as arguments, or else JSON in a string, as they were.

    Templates are written for objects, and data in OpenAI's format holds strings, which most templates would write with
    quotes around them.
    """
    parsed = [_parsed(message) for message in messages]
    if parsed != list(messages):
        try:
            return write(parsed)
        except HalveError:
            raise
        except Exception:  # of a template that joins strings to its text; what it says of them is told below
            pass
    return write(messages)


def _parsed(held: Any) -> Any:
    """The same data, where what is called `arguments` in it is an object if it was the JSON of one."""
    if isinstance(held, list):
        return [*map(_parsed, held)]
    if not isinstance(held, dict):
        return held
    inside = {key: _parsed(held[key]) for key in ("function", *_CALLS) if key in held}
    try:
        arguments = json.loads(held["arguments"])
    except (KeyError, TypeError, ValueError):
        arguments = None
    return {**held, **inside, **({"arguments": arguments} if isinstance(arguments, dict) else {})}


def renderer(tokenizer: PreTrainedTokenizerBase, tools: Any) -> Render:
    """A function that writes messages as the chat template does, `prompted` with the invitation to answer."""

    def render(messages: Sequence[Any], *, prompted: bool = False) -> str:
        return str(_apply(tokenizer, tools, messages, tokenize=False, add_generation_prompt=prompted))

    return render


def _apply(tokenizer: PreTrainedTokenizerBase, tools: Any, messages: Sequence[Any], **options: Any) -> Any:
    """One rendering. A template is a program, and one that never ends is stopped."""
    with computing(_LONGEST_RENDERING_S), fixed_day():
        return tokenizer.apply_chat_template(list(messages), tools=tools, date_string=DAY, **options)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
