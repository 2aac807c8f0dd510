"""What a family of sizes costs: the largest trained and the others cut from it, against each size trained from scratch.

2407.14679 (Sec. 4.1, "Cost Savings for Training a Model Family") counts three times the forward pass for each size and
leaves out the teacher's passes of a distillation. Its ratio is `saving_by_tokens`. In the other figures these passes
count, and so do scoring and cutting.

Tokens are training tokens. Calibration adds to FLOPs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from halve.anatomy.work import Costed, learning
from halve.cut.cost import Work
from halve.errors import RecipeError
from halve.model.checkpoint import Checkpoint
from halve.preflight.device import PlannedDevice
from halve.preflight.nests import planned_nest
from halve.preflight.sizes import PlannedRound, planned_rounds
from halve.preflight.work import planned_work
from halve.recipe.rounds import parsed, rounds
from halve.recipe.schema import Recipe


@dataclass(frozen=True)
class Member:
    """One size of a family: its training from scratch, and how the family makes it."""

    name: str
    params: int
    scratch: Work
    made: Work

    @property
    def fewer_tokens(self) -> float:
        """How many times fewer tokens the family takes for this size."""
        return self.scratch.tokens / self.made.tokens


@dataclass(frozen=True)
class FamilyCost:
    """The cost of a family, its largest model first, which is trained from scratch in both cases."""

    members: tuple[Member, ...]
    device: PlannedDevice
    price: float | None
    """The price of an hour of the device, in any currency."""

    @property
    def scratch_flops(self) -> float:
        """FLOPs of training every size from scratch."""
        return sum(member.scratch.flops for member in self.members)

    @property
    def made_flops(self) -> float:
        """FLOPs of training the largest from scratch and making the others from it."""
        return sum(member.made.flops for member in self.members)

    @property
    def saving(self) -> float:
        """How many times less compute the whole family takes."""
        return self.scratch_flops / self.made_flops

    @property
    def saving_by_tokens(self) -> float:
        """The same if only tokens are saved, as the paper computes it: without teachers' passes and cuts."""
        return self.scratch_flops / sum(member.scratch.flops / member.fewer_tokens for member in self.members)

    @property
    def saving_of_others(self) -> float:
        """The same where the largest model is there already."""
        others = self.members[1:]
        return sum(member.scratch.flops for member in others) / sum(member.made.flops for member in others)

    def hours(self, flops: float) -> float:
        """Hours of one device."""
        hours = self.device.hours(Work(0, flops))
        assert hours is not None, "a family is planned for a device of known speed"
        return hours

    def money(self, flops: float) -> float | None:
        """The price of these hours."""
        return None if self.price is None else self.price * self.hours(flops)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""

        def told(work: Work) -> dict[str, Any]:
            return {
                "tokens": work.tokens,
                "flops": work.flops,
                "hours": self.hours(work.flops),
                "money": self.money(work.flops),
            }

        return {
            "device": self.device.name,
            "mfu": self.device.mfu,
            "price": self.price,
            "members": [
                {
                    "name": member.name,
                    "params": member.params,
                    "scratch": told(member.scratch),
                    "made": told(member.made),
                    "fewer_tokens": member.fewer_tokens,
                }
                for member in self.members
            ],
            "scratch": {"flops": self.scratch_flops, "hours": self.hours(self.scratch_flops)},
            "made": {"flops": self.made_flops, "hours": self.hours(self.made_flops)},
            "saving": self.saving,
            "saving_by_tokens": self.saving_by_tokens,
            "saving_of_others": self.saving_of_others,
        }


def cost_of_recipe(
    recipe: Recipe, teacher: Checkpoint, *, scratch_tokens: int, device: PlannedDevice, price: float | None = None
) -> FamilyCost:
    """The family of a recipe: its teacher and the student of every round. Reads no weights.

    A size takes the `learning` FLOPs of `scratch_tokens` tokens from scratch, with samples of `data.context` tokens. In
    the family it takes what the dry run counts for its round, without the baselines; of a tournament that is the most
    it may take. A correction of the teacher counts for the first student, alignment for the last. Students of a nest
    share the training of their round. Raises `RecipeError` if a round has no distillation, and what `planned_rounds`
    raises.
    """
    shapes, context = planned_rounds(recipe, teacher), recipe.data.context
    if any(part.distill is None for part in rounds(recipe)):
        raise RecipeError(
            f"recipe {recipe.name} makes a student that is not trained",
            why="a round without the section distill has no tokens to compare with training from scratch",
            fix="add distill: to every round",
        )

    def scratch(model: Costed) -> Work:
        return Work(scratch_tokens, float(scratch_tokens * learning(model)))

    whole = Costed.of(shapes[0].before, context)
    first = scratch(whole)
    members = [Member("teacher", whole.anatomy.ledger.count(whole.arch).params, first, first)]
    work = planned_work(recipe, shapes, teacher)
    del work["evaluate"]  # it makes nothing, and models from scratch are measured as well
    aligning = [work.pop(name) for name in [*work] if parsed(name)[0] == "align"]  # its number is that of a step
    made = {name: done for name, done in work.items() if " (" not in name}
    for number, (part, shape) in enumerate(zip(rounds(recipe), shapes, strict=True), 1):
        assert part.distill is not None
        mine = {name: done for name, done in made.items() if parsed(name)[1] == number}
        tokens: float = part.distill.tokens + (recipe.correct.tokens if recipe.correct and number == 1 else 0)
        tokens += sum(done.tokens for name, done in mine.items() if parsed(name)[0] == "search")
        student = Costed(shape.student, shape.after, context, shape.kept_layers)
        name = "student" if len(shapes) == 1 else f"student {number}"
        flops = sum(done.flops for done in mine.values())
        members.append(Member(name, shape.counts().params, scratch(student), Work(tokens, flops)))
    last = len(members) - 1  # a step starts from the last student, not from those inside it
    if recipe.nest is not None:
        members = [*members[:-1], *_nested(recipe, shapes, members[-1], scratch)]
    members[last] = replace(members[last], made=members[last].made + sum(aligning, Work()))
    return FamilyCost(tuple(members), device, price)


def _nested(
    recipe: Recipe, shapes: Sequence[PlannedRound], largest: Member, scratch: Callable[[Costed], Work]
) -> Iterator[Member]:
    """The student and those inside it. Each is drawn in its share of the steps; FLOPs are split evenly."""
    assert recipe.nest is not None
    assert recipe.distill is not None
    anatomy, sizes = planned_nest(recipe, shapes)
    tokens = largest.made.tokens + (recipe.nest.draws - 1) * recipe.distill.tokens
    made = Work(tokens / len(sizes), largest.made.flops / len(sizes))
    for number, arch in enumerate(sizes, 1):
        name = largest.name if number == 1 else f"nested {number}"
        yield Member(name, anatomy.ledger.count(arch).params, scratch(Costed(anatomy, arch, recipe.data.context)), made)


def cost_of_sizes(
    sizes: Sequence[int], *, tokens: int, scratch_tokens: int, device: PlannedDevice, price: float | None = None
) -> FamilyCost:
    """A family given by parameter counts, the largest first.

    A token takes 6 N FLOPs from scratch and 6 N + 2 N_T in the family. N_T is the largest model, which teaches all
    others. Attention and the cut are left out.
    """
    largest = sizes[0]
    first = Work(scratch_tokens, 6.0 * largest * scratch_tokens)
    others = [
        Member(
            f"student {number}" if len(sizes) > 2 else "student",
            params,
            Work(scratch_tokens, 6.0 * params * scratch_tokens),
            Work(tokens, (6.0 * params + 2.0 * largest) * tokens),
        )
        for number, params in enumerate(sizes[1:], 1)
    ]
    return FamilyCost((Member("teacher", largest, first, first), *others), device, price)
