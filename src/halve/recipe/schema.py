"""The recipe: every setting of a run, typed and checked, without importing torch.

A recipe is one YAML file. Its sections have the names of the stages. `read` turns it into a `Recipe`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from halve.recipe.alignments import Alignment
from halve.recipe.cutting import (
    ONE_SIZE,
    Aggregator,
    DepthCriterion,
    DepthPattern,
    FfnPoint,
    Gain,
    LayerMerge,
    Method,
    Prune,
    Refit,
    Rotation,
    Score,
    Selection,
    ShapeChoice,
)
from halve.recipe.evaluations import CHAT_PROMPTS, Evaluate
from halve.recipe.nesting import Nest
from halve.recipe.searching import Search
from halve.recipe.trainings import (
    HOW,
    Baseline,
    Cache,
    Correct,
    Distill,
    Intermediate,
    Logger,
    LossTerm,
    Phase,
    State,
    Training,
)
from halve.recipe.values import Context, Count, PathOrName, Scale, Section, Seed, Switch, TextSource

__all__ = [
    "CHAT_PROMPTS",
    "HOW",
    "Aggregator",
    "Alignment",
    "Baseline",
    "Cache",
    "Correct",
    "Data",
    "DepthCriterion",
    "DepthPattern",
    "Device",
    "Distill",
    "Dtype",
    "Evaluate",
    "FfnPoint",
    "Gain",
    "Intermediate",
    "LayerMerge",
    "Logger",
    "LossTerm",
    "Method",
    "Phase",
    "Prune",
    "Recipe",
    "Refit",
    "Rotation",
    "Score",
    "Search",
    "Section",
    "Selection",
    "ShapeChoice",
    "Source",
    "State",
    "Step",
    "Training",
]

Boundary = Literal["auto", "bos", "eos", "both", "none"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]

_OF_DISTILLATION = (
    "batch",
    "micro_batch",
    "phases",
    "replicas",
    "checkpoint_every",
    "keep_checkpoints",
    "on_spike",
    "spike_factor",
    "loggers",
    "eval_every",
    "eval_samples",
    "precision",
)
"""Keys that a correction beside a distillation shares with it."""


class Source(Section):
    """One part of a mixture."""

    sources: tuple[TextSource, ...] = Field(min_length=1, description="files, folders or hub data sets of this part")
    weight: Scale = Field(description="share of the samples, relative to the weights of the other parts")
    plain: Switch = Field(False, description="this part is plain text, also where data.messages_field is set")


class Data(Section):
    """Where the text comes from.

    A source is a file (text, `.jsonl`, `.parquet`; text and JSON lines also `.gz`, `.xz`, `.zst`), a folder of such
    files, or `hub:owner/name`, `hub:owner/name:split` for a data set of the hub.
    """

    train: Annotated[
        Annotated[tuple[TextSource, ...], Field(min_length=1), Tag("[sources]")]
        | Annotated[dict[str, Source], Field(min_length=1), Tag("[parts]")],
        Discriminator(lambda given: "[parts]" if isinstance(given, dict) else "[sources]"),
    ] = Field(description="training text: a list of sources, or a mixture of named parts with sources and weights")
    valid: tuple[TextSource, ...] = Field(
        min_length=1, description="held-out text, for the evaluation and for measurements during training"
    )
    text_field: str = Field(
        "text", min_length=1, description="field that holds the text in JSON lines, CSV, parquet and hub rows"
    )
    messages_field: str | None = Field(
        None,
        min_length=1,
        description="field that holds a conversation in JSON lines, parquet and hub rows: a list of messages with role"
        " and content, or from and value; rendered by the tokenizer's chat template",
    )
    count: Literal["assistant", "all"] = Field(
        "assistant", description="which tokens of a conversation losses and measurements count"
    )
    context: Context = Field(512, description="tokens in one sample: of packed text, or at most of one conversation")
    boundary: Boundary = Field(
        "auto",
        description="special tokens at document boundaries; bos: BOS before each document and sample; eos: EOS after"
        " each document; auto: BOS if the tokenizer adds it, EOS unless the teacher never learned it",
    )
    documents: Literal["joined", "apart"] = Field(
        "joined",
        description="apart: in training, attention and prediction do not cross document boundaries; conversations are"
        " always apart, and several are packed in one sample",
    )
    workers: Count = Field(1, description="number of processes that tokenize; the result is the same for any number")

    @property
    def train_sources(self) -> tuple[str, ...]:
        """The sources of the training text; for a mixture, those of all parts in order."""
        if isinstance(self.train, dict):
            return tuple(source for part in self.train.values() for source in part.sources)
        return self.train

    @property
    def reads_text(self) -> bool:
        """Whether some of the training text is no conversations."""
        parts = self.train.values() if isinstance(self.train, dict) else ()
        return self.messages_field is None or any(part.plain for part in parts)

    @model_validator(mode="after")
    def _of_conversations(self) -> Data:
        if self.messages_field is None and self.count != "assistant":
            raise ValueError("count says which tokens of conversations count: set messages_field as well")
        if self.messages_field is None and isinstance(self.train, dict) and any(p.plain for p in self.train.values()):
            raise ValueError("plain says which part is no conversations: set messages_field as well")
        return self


class Step(Section):
    """A further student: by default the last one is pruned again and distilled (as in 15B to 8B to 4B)."""

    prune: Prune = Field(description="the size of this round's student")
    distill: Distill | None = Field(None, description="the training of this round's student")
    teacher: Literal["original", "previous"] = Field(
        "original",
        description="teacher of this round: the run's teacher (corrected, if the run corrects it) or the last student",
    )
    cut: Literal["original", "previous"] = Field(
        "previous", description="the model that this round cuts: the last student, or the run's teacher"
    )

    @field_validator("prune")
    @classmethod
    def _sized(cls, prune: Prune) -> Prune:
        _require_size(prune, searched=False)
        return prune


def _unturned(prune: Prune) -> Prune:
    return prune.model_copy(update={"rotation": "none"}) if prune.rotation == "auto" else prune


def _require_size(prune: Prune, *, searched: bool) -> None:
    ways = [way for way, used in prune.sized_by.items() if used]
    if not searched and not ways:
        raise ValueError(ONE_SIZE)
    if searched and ways:
        raise ValueError(f"the section search finds the size: leave out {ways[0]}, or leave out search")


class Recipe(Section):
    """A whole run, from a teacher to a report."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="label of the run and name of its folder"
    )
    model: PathOrName = Field(description="the teacher: a folder, a hub name or a GGUF file")
    seed: Seed = Field(0, description="seed of all random numbers: order of samples, random weights, draws")
    device: Device = Field("auto", description="where models run; auto: CUDA if there is a GPU")
    dtype: Dtype = Field(
        "auto",
        description="precision of the weights; auto: the checkpoint's, and float32 to compute on a CPU slow in it",
    )
    data: Data
    correct: Correct | None = Field(None, description="without this section, the teacher is not corrected")
    score: Score = Score()
    search: Search | None = Field(None, description="without this section, prune gives the size of the student")
    prune: Prune = Field(Prune(), validate_default=True)
    distill: Distill | None = None
    then: tuple[Step, ...] = Field((), description="further rounds of prune and distill")
    nest: Nest | None = Field(None, description="without this section, there are no students inside the student")
    align: tuple[Alignment, ...] = Field((), description="steps that align the last student, in order")
    evaluate: Evaluate = Evaluate()

    @property
    def corrects_before(self) -> bool:
        """Whether there is a corrected teacher before anything is scored and cut."""
        return self.correct is not None and self.correct.when == "before"

    @property
    def corrects_beside(self) -> bool:
        """Whether every distillation corrects the teacher that it learns from."""
        return self.correct is not None and self.correct.when == "beside"

    @field_validator("prune", "then")
    @classmethod
    def _basis(cls, cuts: Prune | tuple[Step, ...], given: Any) -> Prune | tuple[Step, ...]:
        """Leave the basis alone where another method ranks the channels: principal axes bring their own ranking.

        `given` is pydantic's `ValidationInfo`. Its `data` holds the valid fields above this one.
        """
        if isinstance(cuts, Prune):
            _require_size(cuts, searched=given.data.get("search") is not None)
        score = given.data.get("score")
        if score is None or score.method == "activation":
            return cuts
        if isinstance(cuts, Prune):
            return _unturned(cuts)
        return tuple(step.model_copy(update={"prune": _unturned(step.prune)}) for step in cuts)

    @model_validator(mode="after")
    def _searched(self) -> Recipe:
        searches = any(part.layer_merge == "laco_search" for part in (self.prune, *(step.prune for step in self.then)))
        if searches and (self.score.depth, self.score.depth_pattern) != ("bi", "single"):
            raise ValueError("layer_merge: laco_search finds the layers: leave out score.depth and score.depth_pattern")
        return self

    @model_validator(mode="after")
    def _targets(self) -> Recipe:
        if self.search is not None and self.search.targets and self.then:
            raise ValueError("search.targets makes a student of the teacher for each size: leave out then")
        return self

    @model_validator(mode="after")
    def _beside(self) -> Recipe:
        distillations = [part for part in (self.distill, *(step.distill for step in self.then)) if part is not None]
        if self.correct is None or self.correct.when == "before":
            return self
        if not distillations:
            raise ValueError("correct.when: beside needs a distillation: add distill, or set when: before")
        for key in _OF_DISTILLATION:
            value, allowed = getattr(self.correct, key), [Correct.model_fields[key].default]
            if value not in [*allowed, *(getattr(part, key) for part in distillations)]:
                raise ValueError(
                    f"correct.{key} differs from distill.{key}: with when: beside, both use the value of distill"
                )
        for part in distillations:
            if part.cache != "none":
                raise ValueError(
                    "with correct.when: beside the teacher changes, so the answers in distill.cache would be stale"
                )
            if set(part.terms) == {"ce"}:
                raise ValueError(
                    "correct.when: beside corrects the teacher of distill, and objective: ce needs no teacher"
                )
            if part.teacher_device != "same" or part.offload_teacher or not part.shard_teacher:
                raise ValueError(
                    "with correct.when: beside the teacher trains on the student's device: leave out"
                    " teacher_device, offload_teacher and shard_teacher"
                )
        return self
