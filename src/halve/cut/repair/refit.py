"""Solve for the weights around a cut, so that on the calibration samples the student acts like the teacher.

It works layer by layer, on the inputs that the student computes with its already cut and refit layers:

    readers   q, k, v, gate and up read normalized states in which channels are missing and others differ. A linear map
    A
              predicts the teacher's normalized state from the student's, and a reader W becomes W A. All matrices that
              read the same tensor share one map, because the least-squares solution does not depend on the reader.
    writers   output and down projections read fewer heads or neurons, and slightly different ones. They are solved for
              directly. The target is what the teacher adds to the kept channels, plus the error that the student's
              residual stream has accumulated there. Where layers were dropped, the target of the writer before the gap
              is the stream after it.
    head      like the readers: A predicts what the teacher's head reads.

The papers cut and retrain. OSSCAR and SliceGPT have closed-form repair for single layers. Targets that include the
accumulated error, and one map for the readers, are additions of halve; docs/decisions/0009-refit.md measures both.

`outputs` solves only for the writers, `all` for everything. Each problem is a ridge regression toward the weights that
the cut left (`halve.cut.repair.gram.ridge`). If nothing was cut, the weights are returned unchanged.

Legend: B batch, S seq, D the teacher's hidden, K the student's hidden (kept channels), C channels that a writer reads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.cut.plan.plan import Plan
from halve.cut.repair.gram import Gram, raised, ridge
from halve.cut.score.calibration import Calibration
from halve.cut.score.sites import Site, find_sites, input_dim
from halve.cut.score.walk import Call, States, first_states, layer_modules, record_calls, run_layer, states_bytes
from halve.cut.surgery.trim import take
from halve.model.hooks import Reached, on_input, on_output
from halve.process.waits import bytes_in_words
from halve.progress import Progress


@torch.no_grad()
def refit(
    student: PreTrainedModel, teacher: Calibration, plan: Plan, *, strength: float, everything: bool
) -> PreTrainedModel:
    """A new, refit student. `student` must be the result of `trim` for this teacher and plan. Neither model is changed.

    It takes one pass of the teacher and about two and a half of the student over the samples, and for each site one
    solve, cubic in the width. Residual streams, and what the current layer of the teacher writes, are kept for all
    samples, in memory or in a file (`walk.States`). The progress line shows their size.

    Raises `CheckpointError` for activations that are not finite. Warns with `SingularGramWarning` if there are fewer
    tokens than channels.
    """
    return _Refit(student, teacher, plan, strength=strength, everything=everything).run(teacher.progress)


class _Refit:
    def __init__(
        self, student: PreTrainedModel, taught: Calibration, plan: Plan, *, strength: float, everything: bool
    ) -> None:
        teacher, anatomy, samples_BS = taught.model, taught.anatomy, taught.samples_BS
        self.teacher, self.student = teacher, copy.deepcopy(student)
        self.plan, self.anatomy, self.strength, self.everything = plan, anatomy, strength, everything
        self.samples_BS, self.micro_batch = samples_BS, taught.micro_batch
        self.device = teacher.device
        self.kept_K = torch.tensor(plan.hidden, device=self.device)
        self.found = find_sites(teacher, anatomy)
        self.teacher_layers = layer_modules(teacher, anatomy)
        self.student_anatomy = replace(anatomy, sizes=plan.after)  # for the progress bar
        self.student_layers = layer_modules(self.student, self.student_anatomy)
        samples, seq = samples_BS.shape
        sizes = anatomy.sizes
        self.x_D = States(samples, seq, sizes.hidden, dtype=teacher.dtype)
        self.z_K = States(samples, seq, plan.after.hidden, dtype=teacher.dtype)
        self.calls: dict[int, tuple[list[Call], list[Call]]] = {}

    def run(self, progress: Progress) -> PreTrainedModel:
        samples, seq = self.samples_BS.shape
        before = self.anatomy.sizes.hidden  # twice: before and after the current layer of the teacher
        widths = [before, before, self.plan.after.hidden, *self._widths(0)]
        size = states_bytes(samples, seq, widths, dtype=self.teacher.dtype)
        total = self.samples_BS.numel() * self.plan.after.layers
        with progress.task(f"refit (states: {bytes_in_words(size)})", total) as task:
            self._begin()
            for layer in range(self.plan.after.layers):
                self._layer(layer)
                task.advance(self.samples_BS.numel())
            if self.everything and not self._tied():
                self._head()
        return self.student

    def _begin(self) -> None:
        """Embed, and run the teacher through the layers that the plan drops before the first kept one."""
        for rows in self._rows():
            ids_BS = self.samples_BS[rows]
            self._calls(len(ids_BS))
            self.x_D[rows] = first_states(self.teacher, self.anatomy, ids_BS)
            self.z_K[rows] = first_states(self.student, self.student_anatomy, ids_BS)
        self._skip(range(self.plan.layers[0]))

    def _layer(self, layer: int) -> None:
        """Refit one kept layer, and compute both residual streams up to the next."""
        source = self.plan.layers[layer]
        sites = self.found.layers[source]
        before_D = self.x_D
        given = self._teach(source, sites)
        following = self.plan.layers[layer + 1] if layer + 1 < len(self.plan.layers) else self.anatomy.sizes.layers
        self._skip(range(source + 1, following))
        for number, site in enumerate(sites):
            if site.kind == "write":
                self._write(layer, number, sites, before_D, given)
            elif self.everything:
                self._read(layer, site, given[number])
        for rows in self._rows():
            z_BSK = self.z_K[rows].to(self.device)
            self.z_K[rows] = run_layer(self.student_layers[layer], self._calls(len(z_BSK))[1][layer], z_BSK)

    def _teach(self, source: int, sites: tuple[Site, ...]) -> list[States]:
        """Run a layer of the teacher. Returns readers' inputs and writers' outputs (kept channels) at every site."""
        samples, seq = self.samples_BS.shape
        given = [States(samples, seq, width, dtype=self.teacher.dtype) for width in self._widths(source)]
        after_D = States(samples, seq, self.anatomy.sizes.hidden, dtype=self.teacher.dtype)
        for rows in self._rows():
            with ExitStack() as hooks:
                for site, states in zip(sites, given, strict=True):
                    module = self.teacher.get_submodule(site.modules[0])
                    if site.kind == "write":
                        hooks.enter_context(on_output(module, partial(self._keep_channels, states, rows)))
                    else:
                        hooks.enter_context(on_input(module, partial(states.__setitem__, rows)))
                x_BSD = self.x_D[rows].to(self.device)
                after_D[rows] = run_layer(self.teacher_layers[source], self._calls(len(x_BSD))[0][source], x_BSD)
        self.x_D = after_D
        return given

    def _skip(self, layers: range) -> None:
        for layer in layers:
            for rows in self._rows():
                x_BSD = self.x_D[rows].to(self.device)
                self.x_D[rows] = run_layer(self.teacher_layers[layer], self._calls(len(x_BSD))[0][layer], x_BSD)

    def _read(self, layer: int, site: Site, read_D: States) -> None:
        names = [self.anatomy.in_layer(name, layer) for name in site.modules]
        gram = Gram(self.plan.after.hidden, self.anatomy.sizes.hidden, device=self.device)
        for rows in self._rows():
            seen, _ = self._run_to(layer, names[0], rows)
            gram.add(seen, read_D[rows].to(self.device))
        gram.check(names[0])
        guess_DK = ridge(gram.xx_XX, gram.yx_YX, self._selection(), strength=self.strength)
        for name, source in zip(names, site.modules, strict=True):
            rows_kept = {axis: kept for axis, kept in self.plan.kept(layer).items() if axis != "hidden"}
            full = take(self.teacher.get_parameter(f"{source}.weight"), self.anatomy, f"{source}.weight", rows_kept)
            new = _oriented(full, self.anatomy, source).double() @ guess_DK
            _weight(self.student.get_submodule(name)).copy_(_oriented(new, self.anatomy, source))

    def _write(self, layer: int, number: int, sites: tuple[Site, ...], before_D: States, given: list[States]) -> None:
        source = sites[number].modules[0]
        name = self.anatomy.in_layer(source, layer)
        module = self.student.get_submodule(name)
        earlier = {
            index: self.anatomy.in_layer(site.modules[0], layer)
            for index, site in enumerate(sites[:number])
            if site.kind == "write"
        }
        last = not any(site.kind == "write" for site in sites[number + 1 :])
        scale = self.found.scales[self.plan.layers[layer]]
        bias = getattr(module, "bias", None)
        weight_KC = _oriented(_weight(module), self.anatomy, source)
        gram = Gram(weight_KC.shape[1], weight_KC.shape[0], device=self.device)
        for rows in self._rows():
            seen, written = self._run_to(layer, name, rows, tuple(earlier.values()))
            goal_BSK = raised(given[number][rows].to(self.device))
            if scale is not None:
                z_BSK = raised(self.z_K[rows].to(self.device))
                if last:
                    teacher_BSK = self._kept(self.x_D[rows])
                    goal_BSK = (teacher_BSK - z_BSK) / scale - _sum(written)
                else:
                    due = (self._kept(before_D[rows]) - z_BSK) / scale
                    taught = [given[index][rows].to(self.device) for index in earlier]
                    goal_BSK = goal_BSK + due + _sum(taught) - _sum(written)
            gram.add(seen, goal_BSK if bias is None else goal_BSK - raised(bias))
        gram.check(name)
        new = ridge(gram.xx_XX, gram.yx_YX, weight_KC, strength=self.strength)
        _weight(module).copy_(_oriented(new, self.anatomy, source))

    def _head(self) -> None:
        """Refit the head, which reads the final norm of the streams."""
        taught, learned = _final(self.teacher, self.anatomy), _final(self.student, self.anatomy)
        gram = Gram(self.plan.after.hidden, self.anatomy.sizes.hidden, device=self.device)
        for rows in self._rows():
            gram.add(learned(self.z_K[rows].to(self.device)), taught(self.x_D[rows].to(self.device)))
        gram.check("the head")
        guess_DK = ridge(gram.xx_XX, gram.yx_YX, self._selection(), strength=self.strength)
        head, own = self.teacher.get_output_embeddings(), self.student.get_output_embeddings()
        own.weight.copy_(head.weight.double() @ guess_DK)

    # ---- small parts

    def _rows(self) -> Iterator[slice]:
        for start in range(0, len(self.samples_BS), self.micro_batch):
            yield slice(start, min(start + self.micro_batch, len(self.samples_BS)))

    def _calls(self, batch: int) -> tuple[list[Call], list[Call]]:
        """How both models call their layers on this many samples."""
        if batch not in self.calls:
            ids_BS = self.samples_BS[:batch]
            self.calls[batch] = (
                record_calls(self.teacher, self.anatomy, ids_BS)[0],
                record_calls(self.student, self.student_anatomy, ids_BS)[0],
            )
        return self.calls[batch]

    def _run_to(self, layer: int, name: str, rows: slice, earlier: Sequence[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Run a layer of the student up to a module. Returns its input, and the outputs of `earlier` modules."""
        seen: list[Tensor] = []
        written: list[Tensor] = []

        def leave(x: Tensor) -> None:
            seen.append(x)
            raise Reached

        z_BSK = self.z_K[rows].to(self.device)
        with ExitStack() as hooks:
            for other in earlier:
                hooks.enter_context(on_output(self.student.get_submodule(other), written.append))
            hooks.enter_context(on_input(self.student.get_submodule(name), leave))
            with suppress(Reached):
                run_layer(self.student_layers[layer], self._calls(len(z_BSK))[1][layer], z_BSK)
        return seen[0].reshape(*z_BSK.shape[:2], -1), written

    def _widths(self, source: int) -> list[int]:
        hidden, kept = self.anatomy.sizes.hidden, self.plan.after.hidden
        return [kept if site.kind == "write" else hidden for site in self.found.layers[source]]

    def _keep_channels(self, states: States, rows: slice, y: Tensor) -> None:
        states[rows] = y.index_select(-1, self.kept_K)

    def _kept(self, x_BSD: Tensor) -> Tensor:
        return raised(x_BSD.to(self.device).index_select(-1, self.kept_K))

    def _selection(self) -> Tensor:
        """The map of a cut without refit: every kept channel predicts itself."""
        eye_DD = torch.eye(self.anatomy.sizes.hidden, dtype=torch.float64, device=self.device)
        return eye_DD[:, self.kept_K]

    def _tied(self) -> bool:
        return self.student.get_output_embeddings().weight is self.student.get_input_embeddings().weight


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
