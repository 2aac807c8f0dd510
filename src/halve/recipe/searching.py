"""The section of a recipe that searches: what a shape may cost, which axes may change, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from halve.recipe.amounts import Amount, Unit, parse_amount
from halve.recipe.values import Count, CountFromZero, PathOrName, Rate, Real, Scale, Section, Written

Quantity = Literal[
    "total",
    "non_embedding",
    "active",
    "weight_bytes",
    "memory",
    "flops",
    "prefill_latency",
    "decode_latency",
    "throughput",
]
"""What a budget can bound."""
SearchedAxis = Literal["hidden", "ffn", "heads", "kv_heads", "layers"]
StoredAs = Literal["float32", "bfloat16", "float16"]
Length: TypeAlias = Annotated[Count, Field(le=10**9)]
AtOnce: TypeAlias = Annotated[Count, Field(le=10**6)]
"""Contexts and batches at which 64 bits hold every count."""


CROSSED = "crossed_bounds"
"""The kind of error of a min above a max. Its context has both."""


def _crossed(least: object, most: object) -> PydanticCustomError:
    return PydanticCustomError(CROSSED, "min {min} is above max {max}", {"min": str(least), "max": str(most)})


class Limits(Section):
    """Bounds of a quantity: each an amount, or a share of the teacher's such as 70%."""

    unit: ClassVar[Unit] = "parameters"

    about: Written | None = Field(None, description="at most 5 % more or less than this (2407.14679, Sec. 2.4)")
    min: Written | None = Field(None, description="at least this")
    max: Written | None = Field(None, description="at most this")

    @property
    def given(self) -> dict[str, Amount]:
        """The bounds that are set, by their key."""
        written = {key: getattr(self, key) for key in ("about", "min", "max")}
        return {key: parse_amount(text, self.unit) for key, text in written.items() if text is not None}

    @model_validator(mode="after")
    def _amounts(self) -> Limits:
        amounts = self.given
        if not amounts:
            raise ValueError("give min, max or both, or about")
        if "about" in amounts and len(amounts) > 1:
            raise ValueError("about is a range by itself: leave out min and max")
        if {"min", "max"} <= amounts.keys() and amounts["min"].is_share == amounts["max"].is_share:
            least, most = amounts["min"].value, amounts["max"].value
            if least > most:
                raise _crossed(self.min, self.max)
        return self


class ByteLimits(Limits):
    """Bounds of the bytes of all weights."""

    unit: ClassVar[Unit] = "bytes"

    dtype: StoredAs = Field("bfloat16", description="the type in which the weights are counted")


class MemoryLimits(Limits):
    """Bounds of the bytes of all weights and of the key-value cache of a full context."""

    unit: ClassVar[Unit] = "bytes"

    batch: AtOnce = Field(1, description="number of sequences in the cache")
    context: Length = Field(4096, description="tokens of each sequence")
    dtype: StoredAs = Field("bfloat16", description="the type in which weights and cache are counted")


class FlopsLimits(Limits):
    """Bounds of the FLOPs of one token in a forward pass."""

    unit: ClassVar[Unit] = "FLOPs"

    context: Length = Field(4096, description="context length at which attention is counted")


class TimeLimits(Limits):
    """Bounds of a time that is measured on the machine at hand."""

    unit: ClassVar[Unit] = "seconds"

    batch: AtOnce = Field(1, description="number of sequences at once")
    context: Length = Field(512, description="tokens of each prompt")


class RateLimits(TimeLimits):
    """Bounds of the generated tokens per second of all sequences, measured on the machine at hand."""

    unit: ClassVar[Unit] = "tokens/s"


def _bare(key: str) -> Callable[[Any], Any]:
    """A value alone stands for this bound."""

    def spelled(given: Any) -> Any:
        return given if isinstance(given, dict | Limits) or given is None else {key: given}

    return spelled


_ABOUT, _AT_MOST, _AT_LEAST = (BeforeValidator(_bare(key)) for key in ("about", "max", "min"))


class ShapeBudget(Section):
    """What a shape may cost. Any number of quantities together; each a value alone, or a section with bounds."""

    total: Annotated[Limits | None, _ABOUT] = Field(
        None, description="all parameters, such as 4.5B; a value alone is met within 5 %"
    )
    non_embedding: Annotated[Limits | None, _ABOUT] = Field(
        None, description="parameters outside the embeddings; a value alone is met within 5 %"
    )
    active: Annotated[Limits | None, _ABOUT] = Field(
        None, description="parameters that one token goes through; a value alone is met within 5 %"
    )
    weight_bytes: Annotated[ByteLimits | None, _AT_MOST] = Field(
        None, description="bytes of all weights, such as 2GB; a value alone is the most"
    )
    memory: Annotated[MemoryLimits | None, _AT_MOST] = Field(
        None, description="bytes of weights and key-value cache; a value alone is the most"
    )
    flops: Annotated[FlopsLimits | None, _AT_MOST] = Field(
        None, description="FLOPs of one token in a forward pass; a value alone is the most"
    )
    prefill_latency: Annotated[TimeLimits | None, _AT_MOST] = Field(
        None, description="time for the prompt, measured, such as 200ms; a value alone is the most"
    )
    decode_latency: Annotated[TimeLimits | None, _AT_MOST] = Field(
        None, description="time for one more token of every sequence, measured; a value alone is the most"
    )
    throughput: Annotated[RateLimits | None, _AT_LEAST] = Field(
        None, description="generated tokens per second, measured; a value alone is the least"
    )

    @property
    def bounds(self) -> dict[Quantity, Limits]:
        """The bounds by quantity, in the order of the keys."""
        named = {cast("Quantity", name): getattr(self, name) for name in type(self).model_fields}
        return {quantity: bound for quantity, bound in named.items() if bound is not None}

    @property
    def asked(self) -> dict[Quantity, tuple[dict[str, Amount], dict[str, Any]]]:
        """Amounts and conditions by quantity: equal for budgets that mean the same, however they are written."""
        bounds = ("about", "min", "max")
        return {
            quantity: (limits.given, limits.model_dump(exclude={*bounds})) for quantity, limits in self.bounds.items()
        }

    @model_validator(mode="after")
    def _some(self) -> ShapeBudget:
        if not self.bounds:
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self


def _share(given: Any) -> Any:
    """A share alone, such as 70%, is a share of the non-embedding parameters."""
    return given if isinstance(given, dict | ShapeBudget) else {"non_embedding": given}


def _kind_of_freedom(given: Any) -> str:
    if isinstance(given, list | tuple):
        return "[sizes]"
    return "[word]" if isinstance(given, str) else "[divisor]"


SizeTarget: TypeAlias = Annotated[ShapeBudget, BeforeValidator(_share)]
Freedom: TypeAlias = Annotated[
    Annotated[Literal["frozen", "allowed"], Tag("[word]")]
    | Annotated[Count, Tag("[divisor]")]
    | Annotated[tuple[Count, ...], Field(min_length=1), Tag("[sizes]")],
    Discriminator(_kind_of_freedom),
]
"""How an axis may change: not at all, in the usual steps, in multiples of a number, or to one of these sizes."""


class Depth(Section):
    """Which numbers of layers a shape may have, and which layers it keeps."""

    min: Count | None = Field(None, description="the smallest number of layers")
    max: Count | None = Field(None, description="the largest number of layers")
    keep: tuple[CountFromZero, ...] = Field((), description="layers that every shape keeps, counted from 0")

    @model_validator(mode="after")
    def _ordered(self) -> Depth:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise _crossed(self.min, self.max)
        if len(set(self.keep)) < len(self.keep):
            raise ValueError("keep names a layer twice")
        if self.max is not None and len(self.keep) > self.max:
            raise ValueError(f"keep names {len(self.keep)} layers, more than max {self.max}")
        return self


class Tournament(Section):
    """Short distillations of all finalists, of which the better ones go on (successive halving)."""

    tokens: Count | None = Field(
        None, description="tokens on which a winner has trained at the end; default: two fifths of distill.tokens"
    )
    rungs: Count = Field(3, description="number of rounds; after each only the better finalists go on")
    keep: Real = Field(0.5, gt=0, lt=1, description="share of the finalists that goes on after a round")
    train: Literal["full", "lora"] = Field("full", description="what is trained; lora: adapters only")
    lora_rank: Count = Field(16, description="rank of the LoRA adapters")
    lora_alpha: Scale = Field(32.0, description="LoRA scale: an adapter is multiplied by lora_alpha / lora_rank")
    lr: Rate | None = Field(None, description="peak learning rate; default: that of distill")
    batch: Count | None = Field(None, description="samples in one optimizer step; default: that of distill")
    micro_batch: Count | None = Field(None, description="samples in one forward pass; default: that of distill")
    on_spike: Literal["stop", "skip", "rewind"] | None = Field(
        None, description="reaction to a loss spike; default: that of distill"
    )
    choices: PathOrName | None = Field(
        None, description="multiple-choice file by which the finalists are compared as well"
    )


class Search(Section):
    """Which shape to train: legal shapes under a budget, and a choice among candidates (2407.14679, Sec. 2.4)."""

    budget: ShapeBudget | None = Field(None, description="what a shape may cost")
    targets: tuple[SizeTarget, ...] = Field(
        (),
        description="several sizes from one teacher, each searched, cut and distilled; each a share such as 70%, or a"
        " section as budget",
    )
    axes: dict[SearchedAxis, Freedom] = Field(
        {},
        description="how each axis may change: frozen, allowed, a divisor of its sizes, or a list of sizes; default:"
        " heads stay with their groups, other axes are allowed in steps that kernels and quantization like",
    )
    layers: Depth = Field(Depth(), description="numbers of layers that are allowed, and layers that stay")
    candidates: Count = Field(8, description="number of finalists, from at least three depths where that is possible")
    method: Literal["tournament", "trial", "additive"] = Field(
        "tournament",
        description="how a finalist is chosen; tournament: short distillation; trial: KL after cut and refit;"
        " additive: a value for each block, added up (a baseline)",
    )
    tournament: Tournament = Field(Tournament(), description="how finalists are trained and left behind")

    @model_validator(mode="after")
    def _bounded(self) -> Search:
        if (self.budget is None) == (not self.targets):
            raise ValueError("give budget for one size, or targets for several")
        asked = [target.asked for target in self.targets]
        for number, target in enumerate(asked, 1):
            if target in asked[: number - 1]:
                first = asked.index(target) + 1
                raise ValueError(f"targets {first} and {number} are the same size: the same search would run twice")
        return self

    @property
    def of_each_target(self) -> tuple[Search, ...]:
        """The searches of single sizes that `targets` asks for."""
        return tuple(self.model_copy(update={"budget": target, "targets": ()}) for target in self.targets)
