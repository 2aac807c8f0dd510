"""Hooks on modules while a block runs. They are removed on every exit, so the modules are unchanged afterwards.

    on_input     the input of a module, before it runs
    on_output    its output
    on_passage   both, after it has run

If there are several inputs or outputs, the first is taken. The others are masks, rotary tables and caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""(module, positional, keywords); a result other than None replaces the arguments."""
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""(module, positional, keywords, output); a result other than None replaces the output."""
Hear = Callable[[Tensor], None]


class Reached(Exception):
    """Raised by a hook to leave the model when the required tensors have been seen."""


@contextmanager
def hooked(modules: Iterable[nn.Module], *, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """In this context, call `before` before each of these modules runs and `after` after it."""
    with ExitStack() as hooks:
        for module in modules:
            if before is not None:
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if after is not None:
                hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


def on_input(module: nn.Module, call: Hear) -> AbstractContextManager[None]:
    """In this context, pass the first input of a module to `call`, before the module runs."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call(first_input(args, kwargs))

    return hooked([module], before=before)


def on_output(module: nn.Module, call: Hear) -> AbstractContextManager[None]:
    """In this context, pass the first output of a module to `call`."""

    def after(_: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        call(first_output(output))

    return hooked([module], after=after)


def on_passage(module: nn.Module, call: Callable[[Tensor, Tensor], None]) -> AbstractContextManager[None]:
    """In this context, pass the first input and the first output of a module to `call`."""

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call(first_input(args, kwargs), first_output(output))

    return hooked([module], after=after)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first input tensor of a module's call."""
    first = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(first, Tensor), f"the first input is a {type(first).__name__}"
    return first


def first_output(output: Any) -> Tensor:
    """The first output tensor of a module's call."""
    first = output if isinstance(output, Tensor) else output[0]
    assert isinstance(first, Tensor), f"the first output is a {type(first).__name__}"
    return first
