"""Teachers with channels that are zero everywhere: a cut of those alone must be exact."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from halve.anatomy import Anatomy
from halve.cut.plan.plan import Plan, select
from halve.cut.proof.twins import RandomScores


def dead_channels(model: PreTrainedModel, plan: Plan, anatomy: Anatomy) -> PreTrainedModel:
    """The same model in which the channels that the plan removes are zero everywhere."""
    model = copy.deepcopy(model)
    alive = torch.zeros(anatomy.sizes.hidden, dtype=torch.float64)
    alive[list(plan.hidden)] = 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim, expr in enumerate(anatomy.params[name]):
                if "hidden" in expr.axes:
                    parameter.mul_(alive.view([-1 if d == dim else 1 for d in range(parameter.ndim)]))
    return model


def hidden_plan(twin: Anatomy) -> Plan:
    after = twin.sizes.at(hidden=48)
    return select(twin, after, RandomScores(twin.sizes, 3), gain="constant")
