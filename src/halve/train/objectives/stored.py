"""Objectives and measurements of a student that learns from a cache of the teacher's answers."""

from __future__ import annotations

from collections.abc import Mapping

from halve.model.head import Body, Head
from halve.recipe.schema import Distill
from halve.text.batch import Batch
from halve.train.objectives import logits
from halve.train.teachers.cache import HELDOUT, CachedDraws, CachedHidden, Store


def from_store(store: Store, head: Head, training: Distill, *, vocab: int) -> logits.Objective:
    """The objective of `training`. `head` is the store's, on the student's device; `vocab` are the shared tokens.

    `training` has a term that needs the teacher.
    """
    ce = training.terms.get("ce", 0.0)
    if store.bound.kind == "logits":
        kl, temperature = training.terms["kl"], training.temperature
        return logits.distillation_from_draws(CachedDraws(store), vocab=vocab, kl=kl, temperature=temperature, ce=ce)
    terms = logits.teacher_terms(training)
    return logits.distillation(CachedHidden(store, head), vocab=vocab, terms=terms, ce=ce)


class BySample:
    """The held-out measurements of the loop, each sample by itself, so that students can be compared in pairs.

    Called like `heldout_divergence`, it returns the means over samples of `kl`, `ce` and `agreement`, each sample
    counted alike. `last` then holds the KL of every sample, a mean over its tokens in nats.
    """

    def __init__(self, store: Store, head: Head, samples: Batch, *, vocab: int) -> None:
        teacher = CachedHidden(store, head, HELDOUT)
        singles = [samples[i : i + 1] for i in range(len(samples))]
        self._each = [logits.heldout_divergence(teacher, single, vocab=vocab, micro_batch=1) for single in singles]
        self.last: tuple[float, ...] = ()

    def __call__(self, body: Body, head: Head) -> Mapping[str, float]:
        """Measure a student."""
        measured = [measure(body, head) for measure in self._each]
        self.last = tuple(one["kl"] for one in measured)
        return {key: sum(one[key] for one in measured) / len(measured) for key in measured[0]}
