"""The peak memory of the prune stage, before anything is loaded: models, sums, states, and what passes.

Counted are the moments at which much is held at once: a choice of entries, a refit's widest solves, its head, and the
comparison with the plain cut. The largest counts. In their formulas: D the teacher's hidden, K the student's, X the
channels that a matrix reads, Y those that it writes, V the vocabulary, N the tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig

from halve.anatomy import Anatomy, Arch, discover
from halve.anatomy.work import Costed
from halve.cut import cost
from halve.cut.apply import doubts_rotation, selects_by_refit
from halve.cut.proof.twins import running_twin
from halve.cut.repair.budget import Budget, samples_needed, trial_budget
from halve.cut.repair.refit_scores import choices
from halve.cut.score.sites import find_sites, output_expr, writes
from halve.cut.score.taps import width
from halve.cut.score.walk import IN_MEMORY_BYTES
from halve.errors import HalveError
from halve.model.measure import CHUNK_ELEMENTS
from halve.preflight.memory import Held
from halve.preflight.rehearsal import forward_bytes
from halve.preflight.sizes import PlannedRound
from halve.recipe.schema import Recipe

_SUM = torch.float64.itemsize


def pruning(part: Recipe, shape: PlannedRound, tried: Sequence[Arch], *, turned: bool, **where: Any) -> Held:
    """The fullest moment of a round's prune stage. Of the shapes of a trial the widest count.

    `where` has `dtype` and `on_cpu`.
    """
    shapes = {max(tried, key=lambda arch: getattr(arch, axis)) for axis in ("hidden", "ffn", "layers")} if tried else ()
    cuts = [
        Cutting(part, replace(shape, after=arch), turned=turned, bases=_bases(shape, tried, turned=turned), **where)
        for arch in shapes or (shape.after,)
    ]
    return max((cut.peak() for cut in cuts), key=lambda held: held.total_bytes)


@dataclass(frozen=True)
class Cutting:
    """A cut that is planned, in this precision."""

    part: Recipe
    """The recipe of its round."""
    shape: PlannedRound
    dtype: torch.dtype
    on_cpu: bool
    turned: bool
    """Whether hidden is cut in another basis."""
    bases: int
    """In how many bases a trial refits shapes, its own and another; 0 without a trial."""

    @cached_property
    def before(self) -> Costed:
        """The model that is cut."""
        return Costed.of(self.shape.before, self.part.data.context)

    @cached_property
    def after(self) -> Costed:
        """The student."""
        shape = self.shape
        return Costed(shape.student, shape.after, self.part.data.context, shape.kept_layers)

    @cached_property
    def sites(self) -> int:
        """How many tensors of a layer of the teacher a refit keeps."""
        return _sites(self.shape.before)

    def peak(self) -> Held:
        """The fullest moment."""
        try:
            return max(self.moments(), key=lambda held: held.total_bytes)
        except HalveError:
            raise
        except Exception as error:  # a family's code may read contents, which do not exist
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return replace(self._held(students=2), unknown=why)

    def moments(self) -> Iterator[Held]:
        """What is held at each of them."""
        prune, budget = self.part.prune, cost.budget_for(self.before, self.part.prune)
        if selects_by_refit(prune, self.part.score.method):
            yield self._choosing(budget)
        if prune.refit != "none":
            yield from self._refitting(budget, before=0, kept=0)
        if budget.compared:
            yield self._comparing(budget)
            if self.turned and doubts_rotation(prune):
                yield from self._refitting(budget, before=self._reference(budget), kept=0, beside=1)
        if self.bases:
            yield from self._trying()
        yield self._held(students=1, passing=self._body(self.before.anatomy.config, budget.used))

    # ---- moments

    def _choosing(self, budget: Budget) -> Held:
        """The inverse of the widest Gram matrix, beside those of the other axes of the layer."""
        arch, hidden = self.before.arch, self.before.arch.hidden
        widths = [
            len(choice.cells) * choice.size
            for choice in choices(arch, self.after.arch, width(self.before.anatomy, "heads") // arch.heads).values()
        ]
        if not widths:
            return self._held()
        widest = max(widths)
        sums = _SUM * (sum(x * x for x in widths) + 4 * widest * widest + 2 * hidden * widest)
        states = self._states(budget.used, [hidden])
        return self._held(sums=sums, states=states, passing=self._body(self.before.anatomy.config, budget.used))

    def _refitting(self, budget: Budget, *, before: int, kept: int, beside: int = 0) -> Iterator[Held]:
        """The widest problems. The student is there twice, as it was cut and as it becomes, `beside` others."""
        wide, narrow = self.before.arch.hidden, self.after.arch.hidden
        tokens = self._tokens(budget.used)
        taught = [] if kept else [wide] * (2 + self.sites)
        states = kept + self._states(budget.used, [*taught, narrow])
        passing = self._body(self.shape.config(), budget.used)
        for reads, written in {*self._problems()}:
            add = self.dtype.itemsize * tokens * reads + 4 * tokens * (reads + 2 * written) + 4 * reads * reads
            solve = _SUM * (3 * reads * reads + 6 * reads * written)
            sums = _SUM * 2 * reads * (reads + written)
            more = max(0, solve - passing - add)
            yield self._held(students=2 + beside, sums=sums + more, states=states, passing=before + passing + add)
        if self.part.prune.refit == "all" and self._own_head:
            head = _SUM * self.before.arch.vocab * (wide + narrow)
            states = kept + self._states(budget.used, [wide, narrow])
            yield self._held(students=2 + beside, sums=head, states=states)

    def _comparing(self, budget: Budget) -> Held:
        """The refit student, the plain cut, and the teacher's distributions."""
        passing = self._body(self.before.anatomy.config, budget.compared)
        return self._held(students=2, passing=self._reference(budget) + max(passing, self._shown(budget)))

    def _trying(self) -> Iterator[Held]:
        prune, score = self.part.prune, self.part.score
        available = max(samples_needed(prune, self.before.arch, self.before.context), score.samples, 3)
        budget = trial_budget(prune, self.before.arch, context=self.before.context, available=available)
        kept = budget.used * self.before.context * self.before.arch.hidden * self.dtype.itemsize
        kept *= (1 + self.sites) * self.before.arch.layers + 1
        reference = self._reference(budget)
        if prune.refit != "none":
            kept = self.bases * kept if kept <= IN_MEMORY_BYTES else 0
            yield from self._refitting(budget, before=reference, kept=kept)
        yield self._held(students=1, passing=reference + self._shown(budget))

    # ---- parts

    def _held(self, *, students: int = 0, sums: int = 0, states: int = 0, passing: int = 0) -> Held:
        arch, each = self.before.arch, self.dtype.itemsize
        whole = self.before.anatomy.ledger.count(arch).params
        basis = whole + (arch.vocab * arch.hidden if self.before.anatomy.tied else 0) if self.turned else 0
        made = self.after.anatomy.ledger.count(self.after.arch, kept_layers=self.after.kept_layers).params
        made += arch.vocab * self.after.arch.hidden if self._unties else 0
        models = each * (whole + basis + students * made)
        return Held(models, sums, states, passing, self.on_cpu)

    @property
    def _unties(self) -> bool:
        """Whether a student has a head of its own that its sizes do not count."""
        return self.turned and self.after.anatomy.tied

    @property
    def _own_head(self) -> bool:
        return self._unties or not self.after.anatomy.tied

    def _tokens(self, samples: int) -> int:
        return min(self.part.score.micro_batch, samples) * self.before.context

    def _states(self, samples: int, widths: list[int]) -> int:
        """Bytes of states in main memory; what is larger goes to a file."""
        each = (samples * self.before.context * channels * self.dtype.itemsize for channels in widths)
        return sum(size for size in each if size <= IN_MEMORY_BYTES)

    def _problems(self) -> Iterator[tuple[int, int]]:
        """What matrices read and write where they are solved for."""
        anatomy, after = self.before.anatomy, self.after.arch
        for name in anatomy.modules:
            if anatomy.layer_of(name) is not None and writes(anatomy, name):
                yield anatomy.modules[name].size(after.sizes), output_expr(anatomy, name).size(after.sizes)
        if self.part.prune.refit == "all":
            yield after.hidden, self.before.arch.hidden

    def _reference(self, budget: Budget) -> int:
        return 4 * budget.compared * (self.before.context - 1) * self.before.arch.vocab

    def _shown(self, budget: Budget) -> int:
        """Logits of a micro-batch beside the reference, chunk by chunk, and its entropies, which are not in chunks."""
        vocab = self.before.arch.vocab
        all_entries = min(self.part.score.micro_batch, budget.compared) * (self.before.context - 1) * vocab
        return 4 * max(all_entries, 2 * min(all_entries, CHUNK_ELEMENTS // vocab * vocab))

    def _body(self, config: PretrainedConfig, samples: int) -> int:
        """The peak of a pass of one micro-batch."""
        few = min(self.part.score.micro_batch, samples)
        return forward_bytes(config, self.dtype, samples=few, context=self.before.context)


def _bases(shape: PlannedRound, tried: Sequence[Arch], *, turned: bool) -> int:
    return len({turned and arch.hidden < shape.before.sizes.hidden for arch in tried})


def _sites(anatomy: Anatomy) -> int:
    """The most sites of a layer, on a random twin: they are found by running it."""
    twin = running_twin(anatomy, seed=0)
    return 0 if twin is None else max(map(len, find_sites(twin, discover(twin.config)).layers))
