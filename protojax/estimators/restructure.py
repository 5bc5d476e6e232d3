"""Which components there are: splitting and merging, and a number of components that the data decide.

Gradient-free moves on the means of a spherical mixture between two M-steps. Arrays keep their shapes: a component that
is off has the log-mass NEVER and answers for nothing. No move compares all K components with all others: a few are
drawn, and these are compared with all (R x K, R fixed and small).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from protojax.api import Array, Key, PyTree
from protojax.estimators.spherical import HARD
from protojax.ops.lse import lse
from protojax.ops.unit import unit

# ln of the mass of a component that is off: finite, so that states stay finite; its exponential is zero.
NEVER = -1e30
# Components, and rows, that are drawn for each one that may change.
CANDIDATES = 8


class Memory(NamedTuple):
    """Rows that the moves look at: x [M,D] centred unit rows, valid [M] bool."""

    x: Array
    valid: Array


def split_and_merge(components: PyTree, rows: Memory, key: Key, number: int, within: float) -> tuple[PyTree, Array]:
    """(components, how many moved): at most `number` components that repeat another one go where none is.

    8 * number components are drawn. One whose nearest other prototype is within cosine distance `within` gives up its
    place (of a pair the later one, so that never both do; the other takes its rows at the next E-step) and becomes the
    worst explained, by largest cosine, of 8 * number rows that are drawn. components: {mean [K,D], potential [K], ...}.
    """
    key_component, key_row = jax.random.split(key)
    prototypes = unit(components["mean"])
    on = jnp.ones(prototypes.shape[:1], bool)
    chosen, drawn = _sample(key_component, on, CANDIDATES * number)
    mate, cosine = _nearest_other(prototypes, chosen, on)
    repeats = jnp.where(drawn & (mate < chosen), cosine, jnp.full((), -2.0, cosine.dtype))
    repeats, which = jax.lax.top_k(repeats, min(number, chosen.shape[0]))
    candidates, there = _sample(key_row, rows.valid, CANDIDATES * number)
    fit = _best_cosine(rows.x[candidates], prototypes, on)
    badness, worst = jax.lax.top_k(jnp.where(there, -fit, -jnp.inf), min(number, candidates.shape[0]))
    width = min(repeats.shape[0], badness.shape[0])
    moves = (repeats[:width] > 1.0 - within) & (badness[:width] > -jnp.inf)
    seeds = rows.x[candidates[worst[:width]]]
    return _placed(components, chosen[which[:width]], seeds, moves, on), jnp.sum(moves.astype(fit.dtype))


class Evidence(NamedTuple):
    """What a component is worth, in nats, on the rows of the memory. concentration kappa; price of a component; length
    [K] = |F_k|, the evidence it has gathered being kappa |F_k|."""

    concentration: Array
    price: Array
    length: Array


def evidence(count: Array, first: Array, active: Array, rows: Array) -> Evidence:
    """BIC of a mixture of von Mises-Fisher components of equal mass and one concentration, for large concentrations.

    With N rows, n_k and F_k [D] the sums of responsibilities and of responsibility-weighted rows, K' active components:

        ln L = N [(D-1)/2 ln kappa - kappa (1 - R) - ln K'] + const,   R = sum_k |F_k| / N,
        kappa = (D-1) / (2 (1 - R)) (N - K') / N,

    the last factor because K' directions were fitted to these N rows. One component fewer loses kappa times the fall of
    sum_k |F_k|, to first order, and saves the price

        (D-1)/2 ln N + N / K':   half a logarithm a parameter of its direction, and N (ln K' - ln(K' - 1)).

    N is what the memory holds: as with every BIC, more rows can justify more components."""
    dim, dtype = first.shape[1], first.dtype
    number = jnp.sum(active.astype(dtype))
    length = jnp.where(active, jnp.sqrt(jnp.sum(first * first, axis=1)), jnp.zeros((), dtype))
    spread = 1.0 - jnp.sum(length) / jnp.maximum(jnp.sum(jnp.where(active, count, jnp.zeros((), dtype))), 1.0)
    free = jnp.maximum(rows - number, 1.0) / jnp.maximum(rows, 1.0)
    concentration = 0.5 * (dim - 1) * free / jnp.maximum(spread, 1e-6)
    price = 0.5 * (dim - 1) * jnp.log(jnp.maximum(rows, 2.0)) + rows / jnp.maximum(number, 1.0)
    return Evidence(concentration, price, length)


def adapt(
    components: PyTree, count: Array, first: Array, rows: Memory, key: Key, number: int
) -> tuple[PyTree, dict[str, Array]]:
    """(components, {'merged', 'born'}): at most `number` components are switched off, and as many on, by `evidence`.

    Merge: of 8 * number active components that are drawn, k goes where its nearest other one j can answer for both,

        kappa (|F_j| + |F_k| - |F_j + F_k|) < price      (of a pair the later one; two components stay in any case).

    Birth: a row x of the memory becomes a component where, as a component, it would raise the largest cosines b_i by

        kappa sum_i max(0, x_i . x - b_i) > 2 price,

    twice the price, so that what is born is not merged at once. Tried are 8 * number rows, the worst explained of
    eight times as many that are drawn. Masses are equal among the active: components['log_prior'] is written here.
    components: {mean, potential, log_prior, active (bool), ...}; count [K], first [K,D]: of the E-step over the memory.
    """
    key_component, key_row, key_slot = jax.random.split(key, 3)
    prototypes, active = unit(components["mean"]), components["active"]
    dtype = prototypes.dtype
    held = jnp.sum(rows.valid.astype(dtype))
    worth = evidence(count, first, active, held)

    chosen, drawn = _sample(key_component, active, CANDIDATES * number)
    mate, cosine = _nearest_other(prototypes, chosen, active)
    together = jnp.sqrt(jnp.sum((first[chosen] + first[mate]) ** 2, axis=1))
    saved = worth.price - worth.concentration * (worth.length[chosen] + worth.length[mate] - together)
    saved = jnp.where(drawn & (mate < chosen) & (cosine > -1.5), saved, -jnp.inf)
    saved, which = jax.lax.top_k(saved, min(number, chosen.shape[0]))
    enough = jnp.sum(active.astype(jnp.int32)) - 2 >= jnp.arange(1, saved.shape[0] + 1)
    merges = (saved > 0.0) & enough
    off = jnp.where(merges, chosen[which], active.shape[0])

    # Births fill places that were free before these merges: what is merged now is not the birth of now.
    slots, free = _sample(key_slot, ~active, number)
    best = _best_cosine(rows.x, prototypes, active)
    some, there = _sample(key_row, rows.valid, CANDIDATES * CANDIDATES * number)
    badness, worst = jax.lax.top_k(jnp.where(there, -best[some], -jnp.inf), min(CANDIDATES * number, some.shape[0]))
    seeds = rows.x[some[worst]]
    better = jnp.matmul(seeds, rows.x.T, precision=jax.lax.Precision.HIGHEST) - best[None, :]
    gain = worth.concentration * jnp.sum(jnp.maximum(better, 0.0) * rows.valid[None, :].astype(dtype), axis=1)
    gain, first_of = jax.lax.top_k(jnp.where(badness > -jnp.inf, gain, -jnp.inf), min(number, gain.shape[0]))
    width = min(gain.shape[0], slots.shape[0])
    births = free[:width] & (gain[:width] > 2.0 * worth.price)

    new = _placed(components, slots[:width], seeds[first_of[:width]], births, active)
    on = active.at[off].set(False, mode="drop").at[jnp.where(births, slots[:width], active.shape[0])].set(
        True, mode="drop"
    )  # fmt: skip
    never = jnp.full((), NEVER, dtype)
    new["active"] = on
    new["log_prior"] = jnp.where(on, -jnp.log(jnp.maximum(jnp.sum(on.astype(dtype)), 1.0)), never)
    new["potential"] = jnp.where(on, new["potential"], never)
    fair = jnp.where(births, jnp.exp(jnp.max(new["log_prior"])), jnp.zeros((), dtype))
    usage = new["usage"].at[jnp.where(births, slots[:width], active.shape[0])].set(fair, mode="drop")
    new["usage"] = jnp.where(on, usage, jnp.zeros((), dtype))
    return new, {"merged": jnp.sum(merges.astype(dtype)), "born": jnp.sum(births.astype(dtype))}


# --------------------------------------------------------------------------------------------------- helpers
def _sample(key: Key, among: Array, number: int) -> tuple[Array, Array]:
    """(distinct indices, which of them are `among`): a uniform draw of at most `number`."""
    order = jnp.argsort(jnp.where(among, jax.random.uniform(key, among.shape), 2.0))[: min(number, among.shape[0])]
    return order, among[order]


def _nearest_other(prototypes: Array, chosen: Array, active: Array) -> tuple[Array, Array]:
    """(index [R] of the active prototype of largest cosine to each chosen one but itself, that cosine; -2: none)."""
    cosine = jnp.matmul(prototypes[chosen], prototypes.T, precision=jax.lax.Precision.HIGHEST)
    others = active[None, :] & (jnp.arange(active.shape[0])[None, :] != chosen[:, None])
    cosine = jnp.where(others, cosine, jnp.full((), -2.0, cosine.dtype))
    return jnp.argmax(cosine, axis=1), jnp.max(cosine, axis=1)


def _best_cosine(x: Array, prototypes: Array, active: Array) -> Array:
    """[M] largest cosine to an active prototype, by the streamed sweep: too large by at most HARD ln K."""
    bias = jnp.where(active, jnp.zeros((), x.dtype), jnp.full((), NEVER, x.dtype))
    return HARD * lse(x / HARD, prototypes, bias)


def _placed(components: PyTree, which: Array, means: Array, really: Array, active: Array) -> PyTree:
    """Components `which` [R] where `really` [R] with new means [R,D] and the potential that active ones have on
    average: neither dear nor cheap, the next E-step sets it."""
    count = active.shape[0]
    index = jnp.where(really, which, count)  # out of range: dropped
    potential = components["potential"]
    weight = active.astype(potential.dtype)
    average = jnp.sum(jnp.where(active, potential, jnp.zeros((), potential.dtype))) / jnp.maximum(jnp.sum(weight), 1.0)
    return {
        **components,
        "mean": components["mean"].at[index].set(means, mode="drop"),
        "potential": potential.at[index].set(average, mode="drop"),
    }
