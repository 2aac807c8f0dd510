"""The walk through all families repeats what the code changed."""

from __future__ import annotations

import pytest
from scripted import script

CODE = "X = 1\n\n\ndef f(a):\n    return a\n"
TOLD = '"""What."""\n\nX = 1\n"""About X."""\n\n\ndef f(a):\n    """Do."""\n    # a reason\n    return (a)\n'


@pytest.mark.parametrize(
    ("other", "same"), [(TOLD, True), (CODE.replace("return a", "return a + 0"), False), (CODE + '\nY = "X"\n', False)]
)
def test_what_describes_code_is_no_part_of_its_fingerprint(other: str, same: bool) -> None:
    code_of = script("families").code_of
    assert (code_of(CODE) == code_of(other)) is same
