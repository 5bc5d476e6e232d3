"""Closed forms on the probability simplex: what logits of bounded norm can reach, entropies, best constants.

C categories; a bound s on the norm of the logits, divided by a temperature T, gives z = (s / T) u with |u| <= 1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def largest_probability(categories: int, ratio: float) -> float:
    """max_{|u| <= 1} max_j softmax(ratio u)_j = 1 / (1 + (C-1) exp(-sqrt(C/(C-1)) ratio)), ratio = s / T.

    The maximum is at u = one coordinate sqrt((C-1)/C), the others -1/sqrt(C (C-1)): the most that a unit vector can
    lift one logit above the mean of the others. Raises ValueError for fewer than 2 categories or a negative ratio.
    """
    check_categories(categories)
    if not ratio >= 0:
        raise ValueError(f"ratio of logit norm and temperature: expected a number >= 0, got {ratio!r}.")
    return 1.0 / (1.0 + (categories - 1) * math.exp(-math.sqrt(categories / (categories - 1)) * ratio))


def least_entropy(categories: int, ratio: float) -> float:
    """Entropy in nats of (p, (1-p)/(C-1), ...) with p = `largest_probability`: the least that such logits can reach."""
    top = largest_probability(categories, ratio)
    rest = (1.0 - top) / (categories - 1)
    return -(top * math.log(top) + (0.0 if rest == 0 else (categories - 1) * rest * math.log(rest)))


def ratio_for(categories: int, probability: float) -> float:
    """The s / T from which a largest probability in (1/C, 1) is reachable: the inverse of `largest_probability`."""
    check_categories(categories)
    if not 1.0 / categories < probability < 1.0:
        raise ValueError(f"probability: expected a number in (1/{categories}, 1), got {probability!r}.")
    odds = math.log(probability * (categories - 1) / (1.0 - probability))
    return odds / math.sqrt(categories / (categories - 1))


def check_categories(categories: int) -> None:
    """Raise ValueError for fewer than 2."""
    if categories < 2:
        raise ValueError(f"expected at least 2 categories, got {categories}: one category is always right.")


def entropy(log_probabilities: Array) -> Array:
    """-sum_j p_j ln p_j of rows of log-probabilities [..., C]; exact 0 and finite gradients where ln p underflows."""
    return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)
