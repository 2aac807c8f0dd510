"""YAML as people read it: the core schema of YAML 1.2, no key twice, bounded in size, depth and repetition.

PyYAML reads the scalars of YAML 1.1, in which `on` is true, `1:30` is ninety and `1e-4` is text. Its loader keeps the
last of two equal keys. And with aliases of aliases, a few lines can expand to more than fits into memory.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.resolver import BaseResolver

MAX_BYTES = 1 << 20
MAX_YAML_DEPTH = 32
MAX_NODES = 20_000
"""Upper bound for the keys, values and lists of a document, counted as often as aliases repeat them."""

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
"""The pattern of each kind of plain scalar, and its first characters. Groups of digits as in 1_000 are an addition."""


class _Resolver(BaseResolver):
    """Which plain scalars are no text."""


for _kind, _written, _begins in _SCALARS:
    _Resolver.add_implicit_resolver(_PREFIX + _kind, re.compile(f"(?:{_written})\\Z"), _begins)


class _Loader(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer, _Resolver):
    """From text to nodes, no deeper and no more of them than a recipe can need."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        _Resolver.__init__(self)
        self.depth = self.nodes = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        self.nodes += 1
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self.depth > MAX_YAML_DEPTH:
            raise _refusal(f"it is nested deeper than {MAX_YAML_DEPTH} levels", event)
        if self.nodes > MAX_NODES:
            raise _refusal(f"it has more than {MAX_NODES:,} entries", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes YAML. Quotes text that this reader, or one of YAML 1.1, would read as something else."""


for _kind, _written, _begins in _SCALARS:
    _Dumper.add_implicit_resolver(_PREFIX + _kind, re.compile(f"(?:{_written})\\Z"), _begins)


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    """Use double quotes for unusual line breaks, because other styles would fold them."""
    style = '"' if re.search("[\r\x85\u2028\u2029]", text) else None
    node: ScalarNode = dumper.represent_scalar(_PREFIX + "str", text, style=style)
    return node


_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str | bytes) -> Any:
    """The plain data of a YAML text: dicts, lists, texts, numbers, booleans and None.

    >>> parse_yaml("{lr: 1e-4, tokens: 1_000, at: 1:30, untie: on, name: 'yes'}")
    {'lr': 0.0001, 'tokens': 1000, 'at': '1:30', 'untie': 'on', 'name': 'yes'}

    Bytes are UTF-8. Raises `yaml.YAMLError`.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"it is longer than {MAX_BYTES:,} bytes")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise yaml.YAMLError(str(error)) from error
    root = _Loader(text).get_single_node()
    return None if root is None else _Construction().value(root)


def dump(data: Any) -> str:
    """A text that `parse_yaml` reads as this data again; keys in their order."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=88))


class _Construction:
    """One document's nodes turned into values."""

    def __init__(self) -> None:
        self.made = 0
        self.open: list[Node] = []

    def value(self, node: Node) -> Any:
        self.made += 1
        if self.made > MAX_NODES:
            raise _refusal(f"its aliases repeat more than {MAX_NODES:,} entries", node)
        if isinstance(node, ScalarNode):
            return _scalar(node)
        if any(node is outer for outer in self.open):
            raise _refusal("an alias stands inside of what it repeats", node)
        self.open.append(node)
        made = self._mapping(node) if isinstance(node, MappingNode) else self._list(node)
        self.open.pop()
        return made

    def _list(self, node: Node) -> list[Any]:
        if not isinstance(node, SequenceNode) or node.tag != BaseResolver.DEFAULT_SEQUENCE_TAG:
            raise _unknown_tag(node)
        return [self.value(entry) for entry in node.value]

    def _mapping(self, node: MappingNode) -> dict[Any, Any]:
        if node.tag != BaseResolver.DEFAULT_MAPPING_TAG:
            raise _unknown_tag(node)
        made: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node) if isinstance(key_node, ScalarNode) else None
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise _refusal("a key is neither a word nor a whole number", key_node)
            if key in made:
                raise _refusal(f"the key {key!r:.80} stands there twice", key_node)
            made[key] = self.value(value_node)
        return made


def _scalar(node: ScalarNode) -> Any:
    kind, text = node.tag.removeprefix(_PREFIX), node.value
    if kind == "str":
        return _text(node)
    for known, written, _ in _SCALARS:
        if kind == known:
            if not re.fullmatch(written, text) or len(text) > 400:
                raise _refusal(f"{text!r:.80} is no {kind}", node)
            return _READ[kind](text)
    raise _unknown_tag(node)


def _text(node: ScalarNode) -> str:
    """Characters that JSON spells as two halves (`\\ud83d\\ude00`) are put together; half a character is none."""
    try:
        return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _refusal("it has half of a surrogate pair, which is no character", node) from None


def _whole(text: str) -> int:
    return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)


def _real(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_READ = {"null": lambda text: None, "bool": lambda text: text.lower() == "true", "int": _whole, "float": _real}


def _refusal(why: str, at: Any) -> ConstructorError:
    return ConstructorError(None, None, why, at.start_mark)


def _unknown_tag(node: Node) -> ConstructorError:
    return _refusal(f"{node.tag!r:.80} is no kind of value here", node)
