"""The tables of `halve cost`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halve.report.tables import table
from halve.report.times import duration

if TYPE_CHECKING:
    from halve.preflight.family_cost import FamilyCost


def cost_tables(family: FamilyCost) -> None:
    """Every size from scratch and in the family: tokens, FLOPs, hours of one device, and money if it has a price."""
    from halve.cut.plan.sizes import format_count

    def priced(flops: float) -> list[str]:
        money = family.money(flops)
        return [duration(family.hours(flops)), *([] if money is None else [_money(money)])]

    rows = [
        (
            member.name,
            format_count(member.params),
            *(format_count(round(member.scratch.tokens)), f"{member.scratch.flops:.3g}"),
            *priced(member.scratch.flops),
            *(format_count(round(member.made.tokens)), f"{member.made.flops:.3g}"),
            *priced(member.made.flops),
            f"{member.fewer_tokens:.3g}x",
        )
        for member in family.members
    ]
    scratch, made = family.scratch_flops, family.made_flops
    rows.append(("all", "", "", f"{scratch:.3g}", *priced(scratch), "", f"{made:.3g}", *priced(made), ""))
    each = ("tokens", "FLOP", "device time", *([] if family.price is None else ["money"]))
    columns = ("model", "size", *(f"{word}, scratch" for word in each), *(f"{word}, family" for word in each))
    table(f"cost on {family.device.name} at {family.device.mfu:.0%} of its peak", (*columns, "fewer tokens"), rows)
    print(
        f"the family takes {family.saving:.3g} times less compute than every size from scratch,"
        f" {family.saving_of_others:.3g} times less where the teacher is there already;"
        f" counted without the teacher's passes and the cut, {family.saving_by_tokens:.3g} times less"
    )


def _money(amount: float) -> str:
    """
    >>> _money(0.4), _money(8_123.4), _money(1_583_333.0)
    ('0.4', '8,123', '1.58M')
    """
    from halve.cut.plan.sizes import format_count

    if amount < 10:
        return f"{amount:.2g}"
    return f"{amount:,.0f}" if amount < 9999.5 else format_count(round(amount))
