"""What a teacher does on calibration samples, layer by layer: the residual stream, what is read from it and written.

A refit asks for the layers in their order and needs each once. A trial refits many students on the same samples: there
everything is kept, so that the teacher runs once for all of them.

Legend: S samples, D hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch

from halve.cut.score.calibration import Calibration
from halve.cut.score.sites import find_sites
from halve.cut.score.walk import Call, States, first_states, layer_modules, record_calls, run_layer
from halve.model.hooks import on_input, on_output


class Taught:
    """The teacher's side of a refit on these samples, in micro-batches of these rows.

    If everything fits into `most_bytes`, whatever was run stays (`keep`). Otherwise what lies in front of the layer
    that is asked for is let go.
    """

    def __init__(self, teacher: Calibration, parts: Sequence[slice], *, most_bytes: int = 0) -> None:
        self.teacher, self.parts = teacher, tuple(parts)
        self.sites = find_sites(teacher.model, teacher.anatomy)
        self.keep = self.whole_bytes <= most_bytes
        self._layers = layer_modules(teacher.model, teacher.anatomy)
        self._calls: dict[int, list[Call]] = {}
        self._streams: dict[int, States] = {}
        self._given: dict[int, list[States]] = {}

    @property
    def width(self) -> int:
        """Channels that are held for each token at a time, unless everything is kept."""
        return self.teacher.anatomy.sizes.hidden * (2 + max(len(sites) for sites in self.sites.layers))

    @property
    def whole_bytes(self) -> int:
        """What is held at the end where everything is kept."""
        anatomy, samples = self.teacher.anatomy, self.teacher.samples_BS
        kept = anatomy.sizes.layers + 1 + sum(len(sites) for sites in self.sites.layers)
        return int(samples.numel() * anatomy.sizes.hidden * kept * self.teacher.model.dtype.itemsize)

    def stream(self, layer: int) -> States:
        """The residual stream in front of a layer; of the number of layers: behind the last."""
        if layer not in self._streams:
            self._go_to(layer)
        return self._streams[layer]

    def given(self, layer: int) -> list[States]:
        """At every site of a layer what its readers read or its writer writes."""
        if layer not in self._given:
            self._run(layer)
        return self._given[layer]

    @torch.no_grad()
    def _go_to(self, layer: int) -> None:
        known = max((number for number in self._streams if number < layer), default=None)
        if known is None:
            self._streams[0] = self._states()
            for rows in self.parts:
                ids_BS = self.teacher.samples_BS[rows]
                self._streams[0][rows] = first_states(self.teacher.model, self.teacher.anatomy, ids_BS)
            known = 0
        if self.keep:
            for number in range(known, layer):
                self._run(number)
        elif known < layer:
            states = self._streams.pop(known)
            for rows in self.parts:
                x_BSD = states[rows].to(self.teacher.model.device)
                for number in range(known, layer):
                    x_BSD = run_layer(self._layers[number], self._call(len(x_BSD), number), x_BSD)
                states[rows] = x_BSD
            self._streams[layer] = states

    @torch.no_grad()
    def _run(self, layer: int) -> None:
        """Run one layer and keep what passes at its sites."""
        before_D = self.stream(layer)
        if not self.keep:
            self._given, self._streams = {}, {layer: before_D}
        after_D = self._states()
        given = [self._states() for _ in self.sites.layers[layer]]
        for rows in self.parts:
            x_BSD = before_D[rows].to(self.teacher.model.device)
            call = self._call(len(x_BSD), layer)  # recorded by a pass of its own, that no hook may meet
            with ExitStack() as hooks:
                for site, states in zip(self.sites.layers[layer], given, strict=True):
                    watch = on_output if site.kind == "write" else on_input
                    module = self.teacher.model.get_submodule(site.modules[0])
                    hooks.enter_context(watch(module, partial(states.__setitem__, rows)))
                after_D[rows] = run_layer(self._layers[layer], call, x_BSD)
        self._given[layer], self._streams[layer + 1] = given, after_D

    def _call(self, batch: int, layer: int) -> Call:
        if batch not in self._calls:
            ids_BS = self.teacher.samples_BS[:batch]
            self._calls[batch] = record_calls(self.teacher.model, self.teacher.anatomy, ids_BS)[0]
        return self._calls[batch][layer]

    def _states(self) -> States:
        samples, seq = self.teacher.samples_BS.shape
        hidden: int = self.teacher.anatomy.sizes.hidden
        return States(samples, seq, hidden, dtype=self.teacher.model.dtype)


def micro_batches(samples: int, micro_batch: int, *, held: int = 0) -> tuple[slice, ...]:
    """The rows of micro-batches: those of the fitted samples, then those of the last `held`.

    >>> micro_batches(5, 2, held=2)
    (slice(0, 2, None), slice(2, 3, None), slice(3, 5, None))
    """
    fitted = samples - held
    bounds = [*range(0, fitted, micro_batch), *range(fitted, samples, micro_batch), samples]
    return tuple(slice(start, stop) for start, stop in itertools.pairwise(bounds))
