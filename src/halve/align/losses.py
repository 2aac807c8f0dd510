"""The losses of reward-aware preference optimization (RPO), one value a pair.

For a prompt with a chosen and a rejected answer,

    r = sum_t log pi(y_t) / pi_ref(y_t)            of an answer y, under the model and its reference
    D = r_chosen - r_rejected                      the margin
    b = sigmoid(beta D)                            how likely the model finds the chosen answer to be the better one
    a = sigmoid(eta (R_chosen - R_rejected))       how likely the rewards say that it is

and the loss is a distance of b from a (Nemotron-4 340B, 2406.11704, Sec. 3.3.2). All are
finite for any gap of the rewards, also for equal ones (a = 1/2). They are computed from log-sigmoids, so that a and b
may round to 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from halve.recipe.alignments import PairForm

PairLoss = Callable[..., Tensor]


def rpo_backward(
    margins: Float[Tensor, " pairs"], gaps: Float[Tensor, " pairs"], *, beta: float, eta: float
) -> Float[Tensor, " pairs"]:
    """KL of the rewards' preference from the model's, the usual form of RPO.

        a log(a / b) + (1 - a) log((1 - a) / (1 - b)),    gradient by D: beta (b - a)

    `margins` are D, `gaps` are R_chosen - R_rejected. As eta grows, it becomes DPO's -log b. With a constant gap it is
    conservative DPO, whose label smoothing is 1 - a, minus a constant.
    """
    return _divergence(eta * gaps, beta * margins)


def rpo_forward(
    margins: Float[Tensor, " pairs"], gaps: Float[Tensor, " pairs"], *, beta: float, eta: float
) -> Float[Tensor, " pairs"]:
    """KL of the model's preference from the rewards': `rpo_backward` with the roles of a and b exchanged.

    b log(b / a) + (1 - b) log((1 - b) / (1 - a)),    gradient by D: beta b (1 - b) (beta D - eta gap)
    """
    return _divergence(beta * margins, eta * gaps)


def rpo_squared(
    margins: Float[Tensor, " pairs"], gaps: Float[Tensor, " pairs"], *, beta: float, eta: float
) -> Float[Tensor, " pairs"]:
    """Squared distance of the two logits, `(beta D - eta gap)^2`.

    With eta = 1 and a constant gap of 1/2 it is beta^2 times IPO's loss of `(D - 1 / (2 beta))^2` (2310.12036, Eq. 17).
    """
    return (beta * margins - eta * gaps).square()


PAIR_LOSSES: Mapping[PairForm, PairLoss] = {"backward": rpo_backward, "forward": rpo_forward, "squared": rpo_squared}
"""The loss of every value of `form` in a recipe."""


def _divergence(of: Tensor, from_: Tensor) -> Tensor:
    """KL between two Bernoulli distributions, given by their logits."""
    yes = of.sigmoid() * (logsigmoid(of) - logsigmoid(from_))
    no = (-of).sigmoid() * (logsigmoid(-of) - logsigmoid(-from_))
    return yes + no
