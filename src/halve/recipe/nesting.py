"""The section of a recipe for smaller students inside the weights of the student."""

from __future__ import annotations

from pydantic import Field, model_validator

from halve.recipe.values import Count, Section


class Inside(Section):
    """The sizes of one smaller student. An axis that is not given stays as the next larger student has it."""

    hidden: Count | None = Field(None, description="channels of the residual stream")
    ffn: Count | None = Field(None, description="MLP neurons in each layer")
    heads: Count | None = Field(None, description="query heads in each layer")
    kv_heads: Count | None = Field(None, description="key-value heads in each layer")
    layers: Count | None = Field(None, description="number of layers")

    @model_validator(mode="after")
    def _smaller(self) -> Inside:
        if all(size is None for size in self.model_dump().values()):
            raise ValueError("give at least one of hidden, ffn, heads, kv_heads and layers")
        return self


class Nest(Section):
    """Smaller students inside the student: all share one set of weights, are trained together and leave as models.

    The axes of the student are sorted by importance, and a smaller student is the first part of each. Only the weights
    of norms belong to each student alone. `prune` says how the largest is cut, and `distill` how all are trained.
    """

    sizes: tuple[Inside, ...] = Field(min_length=1, description="the smaller students, from large to small")
    draws: Count = Field(
        1, description="students that learn in one step, drawn in turns; all learn from the same pass of the teacher"
    )

    @model_validator(mode="after")
    def _enough(self) -> Nest:
        if self.draws > 1 + len(self.sizes):
            raise ValueError(f"draws {self.draws} of {1 + len(self.sizes)} students: there are not so many")
        return self
