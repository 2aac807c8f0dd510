"""Solve for the weights around a cut, so that on the calibration samples the student acts like the teacher.

It works layer by layer, on the inputs that the student computes with its already cut and refit layers:

    readers   q, k, v, gate and up read normalized states in which channels are missing and others differ. A linear
              map A predicts the teacher's normalized state from the student's, and a reader W becomes W A. All matrices
              that read the same tensor share one map: the least-squares solution does not depend on the reader.
    writers   output and down projections read fewer heads or neurons, and slightly different ones. They are solved for
              directly. The target is what the teacher adds to the kept channels, plus the error that the student's
              residual stream has accumulated there. Where layers were dropped, the target of the writer before the gap
              is the stream after it.
    head      like the readers: A predicts what the teacher's head reads. A tied head is the embedding table, which
              stays. There one factor on the final norm takes the place of A.

The papers cut and retrain. OSSCAR and SliceGPT have closed-form repair for single layers. Targets that include the
accumulated error, and one map for the readers, are additions of halve; docs/decisions/0009-refit.md measures both.

`outputs` solves only for the writers, `all` for everything. Each problem is a ridge regression toward the weights that
the cut left (`halve.cut.repair.ridge`). If nothing was cut, the weights are returned unchanged.

Legend: B batch, S seq, D the teacher's hidden, K the student's hidden (kept channels), C channels that a writer reads.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.cut.plan.plan import Plan
from halve.cut.repair.gram import raised
from halve.cut.repair.ridge import FIXED, Problem
from halve.cut.repair.taught import Taught, micro_batches
from halve.cut.repair.temper import TiedHead, best_factor
from halve.cut.score.calibration import Calibration
from halve.cut.score.sites import Site, input_dim
from halve.cut.score.walk import Call, States, first_states, layer_modules, record_calls, run_layer, states_bytes
from halve.cut.surgery.gain import norm_kind
from halve.cut.surgery.trim import take
from halve.model.head import split
from halve.model.hooks import Reached, on_input, on_output
from halve.process.waits import bytes_in_words
from halve.progress import Progress


@torch.no_grad()
def refit(
    student: PreTrainedModel,
    teacher: Calibration,
    plan: Plan,
    *,
    everything: bool,
    held: int = 0,
    strength: float = FIXED,
    taught: Taught | None = None,
) -> PreTrainedModel:
    """A new, refit student. `student` must be the result of `trim` for this teacher and plan. Neither model is changed.

    The last `held` samples are not fitted by any layer. They choose the ridge of each matrix (`ridge.chosen_ridge`).
    Without them every matrix has the ridge `strength`.

    It takes one pass of the teacher, unless `taught` holds it already, and about two and a half of the student over the
    samples. Each site takes one to five solves, cubic in the width. Residual streams, and what the current layer of
    the teacher reads and writes, are kept for all samples, in memory or in a file (`walk.States`). The progress line
    shows their size.

    Raises `CheckpointError` for activations that are not finite. Warns with `SingularGramWarning` if there are fewer
    tokens than channels and no ridge is chosen.
    """
    if taught is None:
        taught = Taught(teacher, micro_batches(len(teacher.samples_BS), teacher.micro_batch, held=held))
    return _Refit(student, taught, plan, strength=strength, everything=everything, held=held).run(teacher.progress)


class _Refit:
    def __init__(
        self,
        student: PreTrainedModel,
        taught: Taught,
        plan: Plan,
        *,
        strength: float,
        everything: bool,
        held: int,
    ) -> None:
        self.taught, self.student = taught, copy.deepcopy(student)
        self.teacher, self.anatomy = taught.teacher.model, taught.teacher.anatomy
        self.plan, self.strength, self.everything = plan, strength, everything
        self.samples_BS = taught.teacher.samples_BS
        self.fitted = len(self.samples_BS) - held
        self.chosen: list[tuple[float, float]] = []
        self.device = self.teacher.device
        self.kept_K = torch.tensor(plan.hidden, device=self.device)
        self.student_anatomy = replace(self.anatomy, sizes=plan.after)  # its own config is not read here
        self.student_layers = layer_modules(self.student, self.student_anatomy)
        samples, seq = self.samples_BS.shape
        self.z_K = States(samples, seq, plan.after.hidden, dtype=self.teacher.dtype)
        self.calls: dict[int, list[Call]] = {}

    def run(self, progress: Progress) -> PreTrainedModel:
        samples, seq = self.samples_BS.shape
        size = states_bytes(samples, seq, [self.taught.width, self.plan.after.hidden], dtype=self.teacher.dtype)
        total = self.samples_BS.numel() * self.plan.after.layers
        with progress.task(f"refit (states: {bytes_in_words(size)})", total) as task:
            for rows in self.taught.parts:
                self.z_K[rows] = first_states(self.student, self.student_anatomy, self.samples_BS[rows])
            for layer in range(self.plan.after.layers):
                self._layer(layer)
                task.advance(self.samples_BS.numel())
            if self.everything and not self._tied():
                self._head()
            elif self.everything and self.fitted < samples:
                self._temper()
        if self.fitted < len(self.samples_BS):
            progress.say(chosen_in_words(self.chosen))
        return self.student

    def _layer(self, layer: int) -> None:
        """Refit one kept layer, and take the residual stream to the next."""
        source = self.plan.layers[layer]
        sites = self.taught.sites.layers[source]
        before_D, given = self.taught.stream(source), self.taught.given(source)
        following = self.plan.layers[layer + 1] if layer + 1 < len(self.plan.layers) else self.anatomy.sizes.layers
        beyond_D = self.taught.stream(following)
        for number, site in enumerate(sites):
            if site.kind == "write":
                self._write(layer, number, (before_D, beyond_D), given)
            elif self.everything:
                self._read(layer, site, given[number])
        for rows in self.taught.parts:
            z_BSK = self.z_K[rows].to(self.device)
            self.z_K[rows] = run_layer(self.student_layers[layer], self._call(len(z_BSK), layer), z_BSK)

    def _read(self, layer: int, site: Site, read_D: States) -> None:
        names = [self.anatomy.in_layer(name, layer) for name in site.modules]
        problem = Problem(self.plan.after.hidden, self.anatomy.sizes.hidden, device=self.device)
        for rows in self.taught.parts:
            seen, _ = self._run_to(layer, names[0], rows)
            problem.add(seen, read_D[rows].to(self.device), held=self._held(rows))
        guess_DK = self._solve(problem, self._selection(), names[0])
        for name, source in zip(names, site.modules, strict=True):
            rows_kept = {axis: kept for axis, kept in self.plan.kept(layer).items() if axis != "hidden"}
            full = take(self.teacher.get_parameter(f"{source}.weight"), self.anatomy, f"{source}.weight", rows_kept)
            new = _oriented(full, self.anatomy, source).double() @ guess_DK
            _weight(self.student.get_submodule(name)).copy_(_oriented(new, self.anatomy, source))

    def _write(self, layer: int, number: int, streams: tuple[States, States], given: list[States]) -> None:
        (before_D, beyond_D), sites = streams, self.taught.sites.layers[self.plan.layers[layer]]
        source = sites[number].modules[0]
        name = self.anatomy.in_layer(source, layer)
        module = self.student.get_submodule(name)
        earlier = {
            index: self.anatomy.in_layer(site.modules[0], layer)
            for index, site in enumerate(sites[:number])
            if site.kind == "write"
        }
        last = not any(site.kind == "write" for site in sites[number + 1 :])
        scale = self.taught.sites.scales[self.plan.layers[layer]]
        bias = getattr(module, "bias", None)
        weight_KC = _oriented(_weight(module), self.anatomy, source)
        problem = Problem(weight_KC.shape[1], weight_KC.shape[0], device=self.device)
        for rows in self.taught.parts:
            seen, written = self._run_to(layer, name, rows, tuple(earlier.values()))
            goal_BSK = self._kept(given[number][rows])
            if scale is not None:
                z_BSK = raised(self.z_K[rows].to(self.device))
                if last:
                    goal_BSK = (self._kept(beyond_D[rows]) - z_BSK) / scale - _sum(written)
                else:
                    due = (self._kept(before_D[rows]) - z_BSK) / scale
                    taught = _sum(self._kept(given[index][rows]) for index in earlier)
                    goal_BSK = goal_BSK + due + taught - _sum(written)
            problem.add(seen, goal_BSK if bias is None else goal_BSK - raised(bias), held=self._held(rows))
        new = self._solve(problem, weight_KC, name)
        _weight(module).copy_(_oriented(new, self.anatomy, source))

    def _head(self) -> None:
        """Refit the head, which reads the final norm of the streams."""
        taught, learned = _final(self.teacher, self.anatomy), _final(self.student, self.anatomy)
        last_D = self.taught.stream(self.anatomy.sizes.layers)
        problem = Problem(self.plan.after.hidden, self.anatomy.sizes.hidden, device=self.device)
        for rows in self.taught.parts:
            read, wanted = learned(self.z_K[rows].to(self.device)), taught(last_D[rows].to(self.device))
            problem.add(read, wanted, held=self._held(rows))
        guess_DK = self._solve(problem, self._selection(), "the head")
        head, student_head = self.teacher.get_output_embeddings(), self.student.get_output_embeddings()
        student_head.weight.copy_(head.weight.double() @ guess_DK)

    def _temper(self) -> None:
        """Scale the final norm's weight where the head is tied (`halve.cut.repair.temper`), by the held samples."""
        taught, norm = _final(self.teacher, self.anatomy), _final(self.student, self.anatomy)
        if not isinstance(getattr(norm, "weight", None), Tensor):
            return
        last_D = self.taught.stream(self.anatomy.sizes.layers)
        pairs = (
            (
                norm(self.z_K[rows].to(self.device)).flatten(0, 1),
                taught(last_D[rows].to(self.device)).flatten(0, 1),
            )
            for rows in filter(self._held, self.taught.parts)
        )
        tied = TiedHead(split(self.student)[1], getattr(norm, "bias", None))
        factor, offset = best_factor(pairs, tied, split(self.teacher)[1]), norm_kind(norm).offset
        if factor != 1.0:
            _weight(norm).copy_((_weight(norm).double() + offset) * factor - offset)

    def _solve(self, problem: Problem, prior: Tensor, what: str) -> Tensor:
        fit = problem.solve(prior, strength=self.strength, what=what)
        self.chosen.append((fit.strength, fit.error))
        return fit.weight_YX

    # ---- small parts

    def _held(self, rows: slice) -> bool:
        return bool(rows.start >= self.fitted)

    def _call(self, batch: int, layer: int) -> Call:
        """How the student calls a layer on so many samples."""
        if batch not in self.calls:
            self.calls[batch] = record_calls(self.student, self.student_anatomy, self.samples_BS[:batch])[0]
        return self.calls[batch][layer]

    def _run_to(self, layer: int, name: str, rows: slice, earlier: Sequence[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Run a layer of the student up to a module. Returns its input, and the outputs of `earlier` modules."""
        seen: list[Tensor] = []
        written: list[Tensor] = []

        def leave(x: Tensor) -> None:
            seen.append(x)
            raise Reached

        z_BSK = self.z_K[rows].to(self.device)
        call = self._call(len(z_BSK), layer)  # recorded by a pass of its own, that no hook may meet
        with ExitStack() as hooks:
            for other in earlier:
                hooks.enter_context(on_output(self.student.get_submodule(other), written.append))
            hooks.enter_context(on_input(self.student.get_submodule(name), leave))
            with suppress(Reached):
                run_layer(self.student_layers[layer], call, z_BSK)
        return seen[0].reshape(*z_BSK.shape[:2], -1), written

    def _kept(self, x_BSD: Tensor) -> Tensor:
        return raised(x_BSD.to(self.device).index_select(-1, self.kept_K))

    def _selection(self) -> Tensor:
        """The map of a cut without refit: every kept channel predicts itself."""
        eye_DD = torch.eye(self.anatomy.sizes.hidden, dtype=torch.float64, device=self.device)
        return eye_DD[:, self.kept_K]

    def _tied(self) -> bool:
        return self.student.get_output_embeddings().weight is self.student.get_input_embeddings().weight


def chosen_in_words(chosen: Sequence[tuple[float, float]]) -> str:
    """How far the refit went, by the strength of each matrix and its error on the tokens that it did not fit.

    >>> chosen_in_words([(0.01, 0.5), (0.1, 0.7), (math.inf, 1.0)])
    'refit: ridges 0.01 to 0.1; 70 % of the error is left on unfitted tokens (median); 1 of 3 keep the cut'
    """
    left = statistics.median(error for _, error in chosen)
    ridges = [strength for strength, _ in chosen if math.isfinite(strength)]
    spread = f"ridges {min(ridges):g} to {max(ridges):g}; " if ridges else ""
    return (
        f"refit: {spread}{100 * left:.0f} % of the error is left on unfitted tokens (median);"
        f" {len(chosen) - len(ridges)} of {len(chosen)} keep the cut"
    )


def _final(model: PreTrainedModel, anatomy: Anatomy) -> nn.Module:
    return nn.Identity() if anatomy.final_norm is None else model.get_submodule(anatomy.final_norm)


def _oriented(weight: Tensor, anatomy: Anatomy, name: str) -> Tensor:
    """A stored weight as [out, in], or back to its stored form."""
    return weight if input_dim(anatomy, name) == 1 else weight.T


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return sum((raised(tensor) for tensor in tensors), start=torch.zeros(()))
