"""A synthetic city: distances to eight kinds of service become label distributions, as in the 15-minute-city project.

Everything is drawn from one seed. Besides targets the generator knows E[target | features] (the Bayes prediction), by
redrawing the noise of the distances.
"""

from __future__ import annotations

import numpy as np

from protojax.data.tables import Table, from_distances
from protojax.schedules import check_choice

SERVICES = ("groceries", "school", "health", "park", "cinema", "library", "restaurant", "transport")
DENSITIES = (6.0, 3.0, 5.0, 4.0, 1.5, 2.5, 7.0, 2.0)
PRESETS = ("iid", "district", "seven")
SCALINGS = ("badly", "well")
FAR, SCALE, REDRAWS = 2400.0, 200.0, 200
SIZES = (1844, 308, 1484)


def synthetic_city(
    *,
    preset: str = "iid",
    scaling: str = "badly",
    train_size: int = SIZES[0],
    nasty: bool = False,
    neighbours: int = 0,
    seed: int = 0,
) -> dict[str, Table]:
    """'train', 'val', 'test' (train_size, 308 and 1,484 samples) of F = 33 columns and C = 8 services.

    A district has densities lambda_j = lambda0_j exp(0.6 n), a population density 1e4 exp(0.3 n), an income
    2e4 exp(0.25 n) and 15 uniform constants. A point has walkability g = exp(0.6 n), counts k_j ~ Poisson(lambda_j g),
    distances d_j = min(2400, 700 / sqrt(k_j + 0.5) exp(0.2 n)), 2400 where k_j = 0, and target softmax(-d / 200).

    preset: 'iid' (60 districts, random split), 'district' (60, split 60/10/30), 'seven' (7, split 4/1/2). scaling:
    'badly' (as above) or 'well' (density and income divided by 1e4). nasty: also a constant column, one exp(3 n),
    and one with 1% missing. neighbours S > 0: a star of S points of the same district around each, edges (dx, dy,
    distance, 1).
    """
    check_choice("synthetic_city, preset", preset, PRESETS)
    check_choice("synthetic_city, scaling", scaling, SCALINGS)
    rng = np.random.default_rng([seed, 4051])
    count = 7 if preset == "seven" else 60
    sizes = (train_size, *SIZES[1:])
    group = _districts(rng, preset, count, sizes)
    total = len(group)
    density = np.asarray(DENSITIES)[None, :] * np.exp(0.6 * rng.standard_normal((count, 8)))
    people = np.stack([1e4 * np.exp(0.3 * rng.standard_normal(count)), 2e4 * np.exp(0.25 * rng.standard_normal(count))])
    constants = rng.uniform(size=(15, count))
    walk = np.exp(0.6 * rng.standard_normal(total))
    counts = rng.poisson(density[group] * walk[:, None])
    targets, bayes = _targets(rng, counts)
    people = people / 1e4 if scaling == "well" else people
    columns = {"population_density": people[0][group], "income": people[1][group]}
    columns |= {f"demographic_{i:02d}": constants[i][group] for i in range(15)}
    columns |= {f"built_{i}": rng.uniform(size=total) for i in range(4)}
    columns |= {f"count_{name}": np.minimum(counts[:, j], 20) / 20 for j, name in enumerate(SERVICES)}
    columns |= {"walkability": walk} | {f"walk_noise_{i}": rng.standard_normal(total) for i in range(3)}
    if nasty:
        holes = np.where(rng.uniform(size=total) < 0.01, np.nan, rng.standard_normal(total))
        columns |= {"constant": np.full(total, 3.0), "heavy": np.exp(3 * rng.standard_normal(total)), "holes": holes}
    graph = _star(rng, group, columns, neighbours) if neighbours else {}
    whole = Table("synthetic_city", columns, targets, SERVICES, group, tuple(f"district {i}" for i in range(count)),
                  bayes, graph)  # fmt: skip
    ends = np.cumsum([0, *sizes])
    return {name: whole.take(np.arange(ends[i], ends[i + 1]), f"synthetic_city:{preset}/{name}")
            for i, name in enumerate(("train", "val", "test"))}  # fmt: skip


def _districts(rng: np.random.Generator, preset: str, count: int, sizes: tuple[int, ...]) -> np.ndarray:
    """District of every sample, the splits one after the other; disjoint sets of districts unless the preset is iid."""
    if preset == "iid":
        return rng.integers(0, count, sum(sizes))
    ends = (4, 5, 7) if preset == "seven" else (36, 42, 60)
    order = rng.permutation(count)
    parts = [order[begin:end] for begin, end in zip((0, *ends), ends, strict=False)]
    return np.concatenate([part[np.arange(size) % len(part)] for part, size in zip(parts, sizes, strict=True)])


def _targets(rng: np.random.Generator, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(targets, their mean over redraws of the noise) of counts [N,8]."""
    near = 700.0 / np.sqrt(counts + 0.5)

    def draw() -> np.ndarray:
        d = np.minimum(FAR, near * np.exp(0.2 * rng.standard_normal(counts.shape)))
        return from_distances(np.where(counts == 0, FAR, d), SCALE, FAR)

    targets = draw()
    return targets, np.mean([draw() for _ in range(REDRAWS)], axis=0)


def _star(
    rng: np.random.Generator, group: np.ndarray, columns: dict[str, np.ndarray], size: int
) -> dict[str, np.ndarray]:
    """Neighbours of the same district (fewer than `size` for every third sample: the rest is masked)."""
    matrix = np.stack(list(columns.values()), axis=1)
    place = rng.uniform(-1.0, 1.0, (len(group), 2))
    chosen = np.zeros((len(group), size), np.int64)
    for g in np.unique(group):
        rows = np.flatnonzero(group == g)
        chosen[rows] = rows[rng.integers(0, len(rows), (len(rows), size))]
    offset = place[chosen] - place[:, None, :]
    edges = np.concatenate([offset, np.linalg.norm(offset, axis=2, keepdims=True), np.ones((*chosen.shape, 1))], axis=2)
    mask = np.arange(size)[None, :] < np.where(np.arange(len(group)) % 3 == 0, max(1, size // 2), size)[:, None]
    return {"neighbours": matrix[chosen], "edges": edges, "neighbour_mask": mask}
