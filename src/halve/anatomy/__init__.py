"""What a model is made of: axes, discovery, quirks, exact counts."""

from halve.anatomy.arch import Arch, Counts, Ledger
from halve.anatomy.axes import AXES, CUT_AXES, Axis, Expr
from halve.anatomy.discover import Anatomy, discover

__all__ = ["AXES", "CUT_AXES", "Anatomy", "Arch", "Axis", "Counts", "Expr", "Ledger", "discover"]
