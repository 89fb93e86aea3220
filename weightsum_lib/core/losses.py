"""The loss of the question: CE(main) + CE(support) + a third term on the network with the summed weights."""

import sys
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# Names of the functions below; each is looked up by its name alone, so that what a run uses can be followed.
THIRD_TERMS = ("none", "ce", "signed_gap", "loss_gap", "distill", "logit_difference")


class ThreeTermLoss(NamedTuple):
    """The named terms of :func:`three_term_loss`; scalars. ``third`` is before its weight."""

    total: Tensor
    main: Tensor
    support: Tensor
    third: Tensor


def none(logits, logits_sum, own_loss, cross_entropy):
    """Two networks that never meet: 0."""
    return logits.new_zeros(())


def ce(logits, logits_sum, own_loss, cross_entropy):
    """The sum must solve the task: CE(z_sum, y)."""
    return cross_entropy(logits_sum)


def signed_gap(logits, logits_sum, own_loss, cross_entropy):
    """The letter of the question: CE(z_sum, y) − CE(z, y)."""
    return cross_entropy(logits_sum) - own_loss


def loss_gap(logits, logits_sum, own_loss, cross_entropy):
    """|CE(z_sum, y) − CE(z, y)|."""
    return (cross_entropy(logits_sum) - own_loss).abs()


def distill(logits, logits_sum, own_loss, cross_entropy):
    """KL(softmax z ‖ softmax z_sum) in nats, z held fixed (Hinton et al. 2015)."""
    return F.kl_div(logits_sum.log_softmax(-1), logits.detach().log_softmax(-1), log_target=True, reduction="batchmean")


def logit_difference(logits, logits_sum, own_loss, cross_entropy):
    """What the partner adds must solve the task alone: CE(z_sum − z, y)."""
    return cross_entropy(logits_sum - logits)


def three_term_loss(
    logits_main: Tensor,
    labels_main: Tensor,
    logits_support: Tensor,
    labels_support: Tensor,
    logits_sum: Tensor,
    *,
    third: str = "ce",
    weight: float = 1.0,
    logits_sum_support: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> ThreeTermLoss:
    """L = CE(z_m, y_m) + CE(z_c, y_c) + weight · third.

    The readings of the third term, with z_m = f(x_m; θ_m) and z_sum = f(x_m; θ_m + θ_c):

    - ``none``: 0, two networks that never meet.
    - ``ce``: ``CE(z_sum, y_m)``, the sum must solve the main task.
    - ``signed_gap``: ``CE(z_sum, y_m) − CE(z_m, y_m)``, the letter of the question; at weight 1 it
      cancels the first term.
    - ``loss_gap``: ``|CE(z_sum, y_m) − CE(z_m, y_m)|``, which can also be met by making θ_m worse.
    - ``distill``: ``KL(softmax z_m ‖ softmax z_sum)`` with z_m detached, in nats (Hinton et al. 2015).
    - ``logit_difference``: ``CE(z_sum − z_m, y_m)``.

    Args:
        logits_main: z_m (N, classes) of θ_m on the main task's images.
        labels_main: y_m (N,) integers.
        logits_support: z_c (M, classes) of θ_c on the support task's images.
        labels_support: y_c (M,) integers.
        logits_sum: z_sum (N, classes) of θ_m + θ_c on the main task's images.
        third: one of the readings above.
        weight: factor on the third term. At 0 the term counts as exactly 0, whatever its value: it adds
            nothing to ``total`` and gives no gradient, even if it is infinite or not a number.
        logits_sum_support: f(x_c; θ_m + θ_c) (M, classes). Given, the third term is *symmetric*: the
            same reading with the roles exchanged is added to it.
        label_smoothing: share of the target that every cross-entropy spreads over all classes.

    Returns:
        :class:`ThreeTermLoss` with ``total``, ``main``, ``support``, ``third``.

    Raises:
        ValueError: unknown reading, logits that don't fit their labels, or a sum with another number of
            classes than its network.
    """
    if third not in THIRD_TERMS:
        raise ValueError(f"unknown third term '{third}'; one of {', '.join(THIRD_TERMS)}")
    reading = getattr(sys.modules[__name__], third)

    def terms(logits, logits_sum, labels, names):
        for name, z in zip(names, (logits, logits_sum), strict=True):
            if z is not None and (z.ndim != 2 or len(z) != len(labels) or z.shape[1] != logits.shape[1]):
                wanted = f"({len(labels)}, classes) to fit its labels, and as many classes as its network alone"
                raise ValueError(f"{name} is {tuple(z.shape)}; expected {wanted}")
        cross_entropy = partial(F.cross_entropy, target=labels, label_smoothing=label_smoothing)
        own_loss = cross_entropy(logits)
        return own_loss, 0 if logits_sum is None else reading(logits, logits_sum, own_loss, cross_entropy)

    main, third_main = terms(logits_main, logits_sum, labels_main, ("logits_main", "logits_sum"))
    names = ("logits_support", "logits_sum_support")
    support, third_support = terms(logits_support, logits_sum_support, labels_support, names)
    third_term = third_main + third_support
    total = main + support
    return ThreeTermLoss(total + weight * third_term if weight else total, main, support, third_term)
