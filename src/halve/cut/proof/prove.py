"""The proof of an anatomy, on tiny random twins, before any weight is touched.

The checks of every axis:

- permuting its entries in all parameters does not change the logits, but leaving out any one parameter does;
- trimming gives the logits of the full twin with the same entries masked;
- dropping layers equals skipping them;
- one pass of importance can score it;
- the trimmed twin has the planned number of parameters and reopens in plain transformers, in a fresh process.

No single twin runs in every family. Some code works only in float32, only with hidden = heads x head_dim, or only with
heads of its own size. So twins are tried in turn. An axis is proved if all its checks pass on one twin. If it fails on
every twin, it is refused and never cut.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from halve.anatomy import CUT_AXES, Anatomy, Arch
from halve.anatomy.configs import quiet
from halve.cut.plan.plan import select
from halve.cut.proof.causal import require_causal
from halve.cut.proof.twins import (
    KINDS,
    RandomScores,
    TwinKind,
    fixed_ids,
    logits,
    masked,
    random_twin,
    skipping,
    twin_plan,
)
from halve.cut.score.calibration import Calibration
from halve.cut.score.taps import measure_activations
from halve.cut.surgery.trim import take, trim
from halve.errors import AnatomyError, HalveError
from halve.process import fresh
from halve.process.waits import wait

# Logits of the twins are of order one. Norms and softmax of most families compute in float32 whatever the model is
# in: equal logits differ by rounding (measured below 2e-5), a forgotten weight by 1e-2 and more.
SAME = 1e-4
DIFFERENT = 1e-2


@dataclass(frozen=True)
class Check:
    """One check of one axis. `measure` is the largest difference of logits (for controls: the smallest such)."""

    axis: str
    name: str
    passed: bool
    measure: float
    detail: str = ""
    twin: str = ""
    """The kind of twin that it was made on."""


@dataclass(frozen=True)
class Proof:
    """The results on the twins. Axes that the anatomy refuses by itself have no checks."""

    family: str
    checks: tuple[Check, ...]
    """For a proved axis all checks of one twin. For another axis the first failed check of each twin."""
    refusals: Mapping[str, str]
    """Every axis that must not be cut, with the reason: refused by the anatomy, or failed here."""

    def refused(self, before: Arch, after: Arch) -> tuple[str, str] | None:
        """The first axis that a cut from `before` to `after` touches without proof, and the reason."""
        for axis in CUT_AXES:
            if getattr(before, axis) == getattr(after, axis):
                continue
            with_heads = axis == "kv_heads" and before.heads == before.kv_heads
            reason = self.refusals.get("heads" if with_heads else axis)
            if reason is not None:
                return axis, reason
        return None

    def demand(self, before: Arch, after: Arch) -> None:
        """Raise `AnatomyError` if a cut from `before` to `after` touches an axis that is not proved."""
        if (refusal := self.refused(before, after)) is not None:
            raise AnatomyError(
                f"will not cut {refusal[0]} of {self.family}",
                why=refusal[1],
                fix=f"leave {refusal[0]} alone, or add what is special to the family in anatomy/quirks.py",
            )


_proofs: dict[tuple[type, str, int, bool], Proof] = {}


def prove(anatomy: Anatomy, *, seed: int = 0, reopen: bool = True) -> Proof:
    """Prove each axis on a random twin, in about a second. The fresh process that reopens twins takes seconds more.

    A process proves the same anatomy only once, because studies and runs with several cuts ask often.

    Raises `AnatomyError` for a model that looks ahead: it could be cut, but it does not predict.
    """
    key = (type(anatomy.config), repr(anatomy), seed, reopen)
    if key not in _proofs:
        with wait(f"proving the axes of {anatomy.family} on random twins"):
            _proofs[key] = _on_one_thread(anatomy, seed=seed, reopen=reopen)
    return _proofs[key]


def _on_one_thread(anatomy: Anatomy, *, seed: int, reopen: bool) -> Proof:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the twin is so small that several threads would only slow it down
    try:
        return _prove(anatomy, seed=seed, reopen=reopen)
    finally:
        torch.set_num_threads(threads)


def _prove(anatomy: Anatomy, *, seed: int, reopen: bool) -> Proof:
    left: list[str] = [axis for axis in CUT_AXES if axis not in anatomy.refusals]
    proved: list[Check] = []
    failed: dict[str, list[Check]] = {axis: [] for axis in left}
    for kind in KINDS:
        if not left:
            break
        for axis, checks in _try(anatomy, kind, left, seed=seed, reopen=reopen).items():
            if all(check.passed for check in checks):
                proved += checks
                left.remove(axis)
            else:
                failed[axis].append(next(check for check in checks if not check.passed))
    reasons = {axis: _reason(failed[axis]) for axis in left}
    refused = {**anatomy.refusals, **reasons}
    for axis, other in (("hidden", "heads"), ("heads", "hidden")) if anatomy.coupled else ():
        if other in refused:
            reasons.setdefault(axis, f"it is cut with {other} or not at all, and {other}: {refused[other]}")
    shown = [check for axis in left for check in failed[axis]]
    return Proof(anatomy.family, (*proved, *shown), {**reasons, **anatomy.refusals})


def _try(anatomy: Anatomy, kind: TwinKind, axes: list[str], *, seed: int, reopen: bool) -> dict[str, list[Check]]:
    """The checks of these axes on one twin, each up to the first failure. Empty for a twin that cannot be used."""
    if not kind.differs(anatomy):
        return {}
    try:
        twin = kind.twin(anatomy)
        model = random_twin(twin, seed=seed, dtype=kind.dtype)
        reference = logits(model, twin)
        if not reference.isfinite().all():
            raise ValueError("its logits are not finite")
    except Exception as error:  # a family's own code may raise anything at sizes that it was not written for
        return {axis: [Check(axis, "the twin runs", False, float("nan"), _say(error), str(kind))] for axis in axes}
    require_causal(model, twin)
    axis_checks: dict[str, list[Check]] = {}
    for axis in axes:
        axis_checks[axis] = []
        try:
            for check in _check_axis(axis, model, twin, reference, seed):
                axis_checks[axis].append(check)
                if not check.passed:
                    break
        except Exception as error:
            axis_checks[axis].append(Check(axis, "the twin can be cut", False, float("nan"), _say(error)))
    if reopen:
        for check in _check_reopen([a for a in axes if all(c.passed for c in axis_checks[a])], model, twin, seed):
            axis_checks[check.axis].append(check)
    return {axis: [replace(check, twin=str(kind)) for check in checks] for axis, checks in axis_checks.items()}


def _reason(failed: list[Check]) -> str:
    """Why an axis failed: its failed check on the twin that came furthest."""
    order = ["the twin runs", "the twin can be cut"]
    furthest = max(failed, key=lambda check: order.index(check.name) if check.name in order else len(order))
    tried = f" (on every twin: {len(failed)} tried)" if len(failed) > 1 else ""
    return f"the proof failed: {furthest.name}: {furthest.detail or f'{furthest.measure:.2g}'}{tried}"


def _say(error: Exception) -> str:
    what = error.what if isinstance(error, HalveError) else f"{type(error).__name__}: {error}"
    return " ".join(what.split())[:200]


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


# ---- 1. permutations


def _check_axis(axis: str, model: PreTrainedModel, twin: Anatomy, reference: Tensor, seed: int) -> Iterator[Check]:
    if axis == "layers":
        yield _check_layers(model, twin, seed)
        yield _check_scores(axis, model, twin)
        return
    permutations = _permutations(axis, twin, seed)
    carriers = [name for name, shape in twin.params.items() if any(_moved(axis, twin) & e.axes for e in shape)]
    moved = _with(model, twin, permutations, carriers)
    gap = _gap(logits(moved, twin), reference)
    yield Check(axis, "permuting it leaves the logits", gap < SAME, gap)
    yield _check_controls(axis, model, twin, reference, permutations, carriers)
    yield _check_trim(axis, model, twin, seed)
    yield _check_scores(axis, model, twin)


def _moved(axis: str, twin: Anatomy) -> frozenset[str]:
    """Axes whose entries move when this one is permuted: groups carry their heads."""
    if axis == "kv_heads" or (axis == "heads" and twin.sizes.heads == twin.sizes.kv_heads):
        return frozenset({"heads", "kv_heads"})
    return frozenset({axis})


def _permutations(axis: str, twin: Anatomy, seed: int) -> Callable[[int | None], dict[str, tuple[int, ...]]]:
    """For every layer, another order of the axis (for `hidden`, one order everywhere)."""
    sizes = twin.sizes

    def shuffled(count: int, salt: int) -> list[int]:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000 + salt)).tolist()
        return order if order != list(range(count)) else order[1:] + order[:1]

    def at(layer: int | None) -> dict[str, tuple[int, ...]]:
        if axis == "hidden":
            return {"hidden": tuple(shuffled(sizes.hidden, 0))}
        if layer is None:
            return {}
        if axis == "ffn":
            return {"ffn": tuple(shuffled(sizes.ffn, layer))}
        per_group = sizes.heads // sizes.kv_heads
        groups = shuffled(sizes.kv_heads, layer) if "kv_heads" in _moved(axis, twin) else list(range(sizes.kv_heads))
        inside = shuffled(per_group, layer) if axis == "heads" and per_group > 1 else list(range(per_group))
        heads = tuple(group * per_group + i for group in groups for i in inside)
        return {"heads": heads, "kv_heads": tuple(groups)}

    return at


def _with(
    model: PreTrainedModel,
    twin: Anatomy,
    permutations: Callable[[int | None], dict[str, tuple[int, ...]]],
    names: list[str],
) -> PreTrainedModel:
    moved = copy.deepcopy(model)
    parameters = dict(moved.named_parameters())
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(take(parameters[name], twin, name, permutations(twin.layer_of(name))))
    return moved


def _check_controls(
    axis: str,
    model: PreTrainedModel,
    twin: Anatomy,
    reference: Tensor,
    permutations: Callable[[int | None], dict[str, tuple[int, ...]]],
    carriers: list[str],
) -> Check:
    """Leaving out any single parameter must change the logits, unless this parameter never affects them.

    If none affects them, the permutation has shown nothing, and the check fails.
    """
    moved = _with(model, twin, permutations, carriers)
    parameters, original = dict(moved.named_parameters()), dict(model.named_parameters())
    smallest, silent = float("inf"), ""
    for name in carriers:
        permuted = parameters[name].detach().clone()
        with torch.no_grad():
            parameters[name].copy_(original[name])
            gap = _gap(logits(moved, twin), reference)
            if gap < DIFFERENT:
                # for example, softmax ignores a key bias, so no value of it matters, permuted or not
                parameters[name].copy_(original[name] + torch.linspace(-1, 1, original[name].numel()).view_as(permuted))
                gap = gap if _gap(logits(moved, twin), reference) > SAME else float("inf")
            parameters[name].copy_(permuted)
        if gap < smallest:
            smallest, silent = gap, name
    passed = DIFFERENT < smallest < float("inf")
    why = f"{silent} does not show" if silent else "no parameter of it affects the logits"
    return Check(axis, "leaving out one parameter shows", passed, smallest, "" if passed else why)


# ---- 2. trimming equals masking


def _check_trim(axis: str, model: PreTrainedModel, twin: Anatomy, seed: int) -> Check:
    plan = twin_plan(axis, twin, seed)
    trimmed = logits(trim(model, plan, twin), twin)
    gap = _gap(trimmed, logits(masked(model, plan, twin), twin))
    return Check(axis, "trimming equals masking", gap < SAME, gap)


# ---- 3. dropping equals skipping


def _check_layers(model: PreTrainedModel, twin: Anatomy, seed: int) -> Check:
    worst, which = 0.0, ""
    for gone in range(twin.sizes.layers if twin.sizes.layers > 1 else 0):
        kept = tuple(layer for layer in range(twin.sizes.layers) if layer != gone)
        after = twin.sizes.at(layers=len(kept))
        plan = select(twin, after, RandomScores(twin.sizes, seed), gain="none", kept_layers=kept)
        with skipping(model, twin, gone):
            reference = logits(model, twin)
        gap = _gap(logits(trim(model, plan, twin), twin), reference)
        if not gap <= worst:
            worst, which = gap, f"without layer {gone} of the twin: {gap:.2g}"
    return Check("layers", "dropping equals skipping", worst < SAME, worst, which if worst >= SAME else "")


# ---- 4. importance can be scored


def _check_scores(axis: str, model: PreTrainedModel, twin: Anatomy) -> Check:
    """One pass of importance over the twin gives every entry of the axis a number."""
    scored_axes = {axis, "heads"} if axis == "kv_heads" else {axis}
    others: dict[str, str] = {other: "not asked for here" for other in CUT_AXES if other not in scored_axes}
    try:
        statistics = measure_activations(Calibration(model, replace(twin, refusals=others), fixed_ids(twin), 2))
        scores = statistics.scores(batch_agg="l2", seq_agg="mean", model="", samples="").by_axis()
    except HalveError as error:
        return Check(axis, "it can be scored", False, float("nan"), error.why)
    problem = "" if axis in scores and bool(scores[axis].isfinite().all()) else "it got no finite scores"
    return Check(axis, "it can be scored", not problem, 0.0, problem)


# ---- 5. the result is an ordinary model


def _check_reopen(axes: list[str], model: PreTrainedModel, twin: Anatomy, seed: int) -> list[Check]:
    """For every axis a trimmed twin is counted and saved; one fresh process opens them all."""
    checks = []
    with tempfile.TemporaryDirectory() as scratch, quiet():
        expected = {}
        for axis in axes:
            plan = twin_plan(axis, twin, seed)
            student = trim(model, plan, twin)
            planned = twin.ledger.count(plan.after, kept_layers=plan.layers).params
            counted = sum(parameter.numel() for parameter in student.parameters())
            detail = "" if counted == planned else f"{counted} parameters where the plan says {planned}"
            checks.append(Check(axis, "parameters as planned", not detail, float(abs(counted - planned)), detail))
            student.save_pretrained(Path(scratch) / axis)
            expected[axis] = logits(student, twin)
        try:
            reopened = fresh_logits(Path(scratch), axes, twin)
        except RuntimeError as error:
            failed = [Check(axis, "reopens in plain transformers", False, float("nan"), str(error)) for axis in axes]
            return [*checks, *failed]
        for axis in axes:
            there = reopened[axis]
            gap, problem = (float("nan"), there) if isinstance(there, str) else (_gap(there, expected[axis]), "")
            checks.append(Check(axis, "reopens in plain transformers", gap < SAME, gap, problem))
    return checks


_FRESH = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
scratch, *axes = sys.argv[1:]
ids = load_file(f"{scratch}/ids.st")["ids"]
for axis in axes:
    try:
        folder = f"{scratch}/{axis}"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        model.config._experts_implementation = "eager"
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits.contiguous()
        save_file({"logits": logits}, f"{scratch}/{axis}.st")
    except Exception as error:
        with open(f"{scratch}/{axis}.error", "w") as file:
            file.write(f"{type(error).__name__}: {error}")
"""


def fresh_logits(scratch: Path, names: list[str], twin: Anatomy) -> dict[str, Tensor | str]:
    """The logits of saved twins as plain transformers computes them in a process that never saw halve.

    For a twin that it does not open, the error instead.
    """
    save_file({"ids": fixed_ids(twin)}, scratch / "ids.st")
    if why := fresh.python(_FRESH, str(scratch), *names):
        raise RuntimeError(f"plain transformers cannot open the result: {why}")
    reopened: dict[str, Tensor | str] = {}
    for name in names:
        error = scratch / f"{name}.error"
        reopened[name] = " ".join(error.read_text().split())[:200] if error.exists() else _saved(scratch / f"{name}.st")
    return reopened


def _saved(path: Path) -> Tensor:
    return load_file(path)["logits"]
