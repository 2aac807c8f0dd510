"""Products are float32's, whichever library makes them; one that rounds is found out and left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from halve.model import products
from halve.model.products import fast_products, product

SETTING = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Each test asks the processor anew."""
    products.rounds_nothing.cache_clear()
    yield
    products.rounds_nothing.cache_clear()


def test_products_keep_float64() -> None:
    assert product(torch.ones(1, 2, dtype=torch.float64), torch.ones(2, 1)).dtype == torch.float64


@pytest.mark.parametrize("shape", [(7, 16, 33), (192, 512, 4096), (1024, 384, 384)])
def test_fast_products_are_float32s(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    before = SETTING.fp32_precision
    with fast_products():
        found = torch.mm(a, b)
    exact = a.double() @ b.double()
    assert (found - exact).norm() < 1e-6 * exact.norm()
    assert SETTING.fp32_precision == before


def test_a_processor_that_rounds_is_not_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(a: Tensor, b: Tensor) -> Tensor:
        allowed = SETTING.fp32_precision == "bf16"
        return a.bfloat16().float() @ b.bfloat16().float() if allowed else a @ b

    monkeypatch.setattr(torch, "mm", rounding)
    before = SETTING.fp32_precision
    assert not products.rounds_nothing()
    with fast_products():
        assert SETTING.fp32_precision == before
    with fast_products(torch.bfloat16):
        assert SETTING.fp32_precision == "bf16"


def test_the_setting_comes_back_after_an_error() -> None:
    before = SETTING.fp32_precision
    with pytest.raises(ZeroDivisionError), fast_products(torch.bfloat16):
        raise ZeroDivisionError
    assert SETTING.fp32_precision == before


def test_the_question_is_put_to_the_processor_in_a_rehearsal_too() -> None:
    with FakeTensorMode(), fast_products():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).shape == (2, 2)
