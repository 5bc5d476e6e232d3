"""How many prototypes could the features tell apart? The control of live-unique counts.

A codebook in which every prototype is in use cannot be more diverse than the features: where they contract to a few
directions, so does whatever follows them. So live-unique counts stand beside those of k-means on the same features,
which no estimator, schedule or drift has touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from protojax.evals.audit import EPSILONS, live_mask, unique_counts, usage
from protojax.evals.kmeans import kmeans
from protojax.evals.neighbours import unit_rows


def attainable(
    features: np.ndarray,
    count: int,
    *,
    epsilons: Sequence[float] = EPSILONS,
    seed: int = 0,
    iterations: int = 50,
) -> dict[str, Any]:
    """{'features': unique counts of the rows themselves, 'kmeans': {'count', 'unique', 'live', 'live_unique',
    'coverage'} of min(count, M) centres of k-means on the same rows}.

    features [M,D], already centred as the estimator centres them; their lengths do not matter. Centres begin by
    k-means++ (once, `seed`) and are read as directions; live as in `audit.live_mask`, of K = `count`. Greedy covers
    depend on the order of rows. Raises ValueError for rows that are not finite.
    """
    features = np.asarray(features)
    rows = unit_rows(features[np.linalg.norm(features, axis=1) > 0.0])
    centres = kmeans(rows, min(count, len(rows)), seed=seed, restarts=1, iterations=iterations).centres
    centres = unit_rows(centres[np.linalg.norm(centres, axis=1) > 0.0])  # the mean of opposite rows has no direction
    used = usage(centres, rows)
    padded = np.zeros(max(count, len(centres)))  # K prototypes share out the rows, however few k-means could make
    padded[: len(centres)] = used.shares
    live = live_mask(padded)[: len(centres)]
    return {
        "features": unique_counts(rows, epsilons),
        "kmeans": {
            "count": len(centres),
            "unique": unique_counts(centres, epsilons),
            "live": int(live.sum()),
            "live_unique": unique_counts(centres, epsilons, among=live),
            "coverage": used.coverage,
        },
    }
