"""Annotations of halve are checked in tests, wherever a function is defined and whatever it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from beartype import beartype
from checks import checked
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from halve.anatomy import Arch, Counts
from halve.cut.repair.rotate import principal_basis
from halve.process.waits import bytes_in_words

check = partial(checked, typechecker=beartype)


def made(size: int) -> Callable[..., int]:
    @check
    def inner(a: int, *rest: str, b: float = 0.5, c: NotThere = None) -> int:  # type: ignore[name-defined] # noqa: F821
        return a if size else "a"  # type: ignore[return-value]

    return inner  # type: ignore[no-any-return]


def test_arguments_and_results_are_checked_in_functions_within_functions() -> None:
    right, wrong = made(1), made(0)
    assert right(3, "x", b=0.25, c="whatever") == 3
    for words, keys in ((("3",), {}), ((3, 4), {}), ((3,), {"b": "0.5"})):
        with pytest.raises(TypeCheckError):
            right(*words, **keys)
    with pytest.raises(TypeCheckError):
        wrong(3)
    with pytest.raises(TypeError):
        right()


def test_generators_give_what_they_gave() -> None:
    @check
    def numbers(upto: int) -> Iterator[int]:
        yield from range(upto)

    assert [*numbers(3)] == [0, 1, 2]
    with pytest.raises(TypeCheckError):
        numbers("3")  # type: ignore[arg-type]


def test_dataclasses_with_the_same_names_are_told_apart() -> None:
    @check
    @dataclass(frozen=True)
    class One:
        value: int

    @check
    @dataclass(frozen=True)
    class Other:
        value: str

    assert (One(1).value, Other("1").value) == (1, "1")
    for wrong in (partial(One, "1"), partial(Other, 1)):
        with pytest.raises(TypeCheckError):
            wrong()


def test_arrays_are_checked_by_their_shapes() -> None:
    @check
    def total(a_NV: Float[Tensor, "tokens vocab"], b_NV: Float[Tensor, "tokens vocab"]) -> Float[Tensor, ""]:
        return (a_NV * b_NV).sum()

    assert total(torch.ones(2, 3), torch.ones(2, 3)) == 6
    with pytest.raises(TypeCheckError):
        total(torch.ones(2, 3), torch.ones(3, 2))


def test_functions_and_dataclasses_of_halve_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        bytes_in_words("12")  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        Arch(2, 4, 8, 2, 1, 2, "16")  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        Counts(*"abcdef")  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        principal_basis(torch.ones(2, 3))
