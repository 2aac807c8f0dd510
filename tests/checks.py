"""The checks of annotations that jaxtyping's import hook puts around every function of halve, made cheap.

jaxtyping works out what to check each time that a `def` is executed, in milliseconds, and binds the arguments of each
call to know their shapes. Functions whose annotations name no array need neither: beartype checks what they are given
and what they return. What is worked out is kept by the function's code, so that a function within another costs nothing
when it is made again. Where arrays are named, jaxtyping does it as before.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

Check = Callable[..., object]
Decorator = Callable[..., Any]

_by_jaxtyping: Decorator = jaxtyping.jaxtyped
_by_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))  # an error as jaxtyping's
_known: dict[tuple[CodeType, str, str], tuple[Check | None, Check | None] | None] = {}
"""By code and full name: what checks the arguments and the result; None where arrays are named.

The code alone does not tell the `__init__` of one dataclass from that of another with fields of the same names.
"""


def checked(function: Any = None, *, typechecker: Any) -> Any:
    """The function with its annotations checked; of a dataclass its `__init__`."""
    if function is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isclass(function):
        made = function.__dict__.get("__init__") if dataclasses.is_dataclass(function) else None
        if made is not None and not hasattr(made, "__wrapped__"):
            function.__init__ = checked(made, typechecker=typechecker)
        return function
    key = (function.__code__, function.__module__, function.__qualname__)
    if key not in _known:
        _known[key] = _checks(function)
    if (both := _known[key]) is None:
        return _by_jaxtyping(function, typechecker=typechecker)
    arguments, result = both

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if arguments is not None:
            arguments(*args, **kwargs)
        returned = function(*args, **kwargs)
        if result is not None:
            result(returned)
        return returned

    return call


def _checks(function: FunctionType) -> tuple[Check | None, Check | None] | None:
    hints = {name: _resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    if any(map(_names_arrays, hints.values())):
        return None
    told = {name: hint for name, hint in hints.items() if hint is not Any}
    returned = {"return": told.pop("return")} if "return" in told else None
    arguments = _by_beartype(_alike(function, told)) if told else None
    result = None if returned is None else _by_beartype(_alike(_result, returned))
    return arguments, result


def _result(value: Any) -> Any:
    return value


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation says; Any where it names what is imported for type checkers alone."""

    def holder(value: Any) -> None:
        del value

    holder.__annotations__ = {"value": annotation}
    try:
        return get_type_hints(holder, names, include_extras=True)["value"]
    except Exception:
        return Any


def _names_arrays(hint: Any) -> bool:
    named = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return named or any(map(_names_arrays, get_args(hint)))


class _Default:
    """Stands in a signature for a default that has no words of its own."""

    def __repr__(self) -> str:
        return "None"


def _alike(function: FunctionType | Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    """A function that takes the same arguments with these annotations, and gives its only one back, or nothing."""
    signature = inspect.signature(function)
    bare = [
        one.replace(annotation=one.empty, default=one.empty if one.default is one.empty else _Default())
        for one in signature.parameters.values()
    ]
    words = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    body = "return value" if function is _result else "pass"
    made: dict[str, Any] = {"__name__": function.__module__}
    exec(f"def {function.__name__}{words}: {body}", made)
    copy = made[function.__name__]
    copy.__annotations__ = hints
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__  # type: ignore[union-attr]
    return copy  # type: ignore[no-any-return]


jaxtyping.jaxtyped = checked  # which is what the hook puts around every function
