"""How many directions a set of features uses: effective rank, RankMe, and the three signs of a constant encoder."""

from __future__ import annotations

import numpy as np

from protojax.evals.neighbours import check_rows, unit_rows


def singular_values(features: np.ndarray, *, centred: bool = False, block: int = 8192) -> np.ndarray:
    """Singular values of features [M,F] (of features - mean when centred), float64 [min(M,F)], largest first.

    Square roots of the eigenvalues of the smaller Gram matrix, accumulated in float64 block by block. A value below
    sqrt(max(M,F) * 2^-52) of the largest is indistinguishable from 0 there and is returned as 0.
    """
    features = check_rows(features, "features")
    mean = features.mean(axis=0, dtype=np.float64) if centred else np.zeros(features.shape[1])
    rows, width = features.shape
    if rows <= width:
        matrix = features.astype(np.float64) - mean[None, :]
        gram = matrix @ matrix.T
    else:
        gram = np.zeros((width, width))
        for start in range(0, rows, block):
            part = features[start : start + block].astype(np.float64) - mean[None, :]
            gram += part.T @ part
    eigenvalues = np.linalg.eigvalsh(gram)[::-1]
    # After centring, what is left of a constant is rounding of the mean: judge it by the uncentred size.
    size = float(np.sum(np.square(mean)) * rows) if centred else 0.0
    floor = max(float(eigenvalues[0]), size) * max(rows, width) * np.finfo(np.float64).eps
    return np.sqrt(np.where(eigenvalues > floor, eigenvalues, 0.0))


def effective_rank(features: np.ndarray, *, centred: bool = False) -> float:
    """exp(-sum_i p_i ln p_i), p = singular values / their sum (Roy & Vetterli 2007); between 1 and min(M,F).

    0 when all features are zero (or, centred, all equal): no direction is used. `centred` subtracts the mean feature
    first; it is what tells a common direction, harmless, from a collapse.
    """
    return _entropy_rank(singular_values(features, centred=centred))


def rankme(features: np.ndarray, epsilon: float = 1e-7) -> float:
    """RankMe (Garrido et al. 2023, eq. 1): exp(-sum_i p_i ln p_i), p_i = s_i / sum(s) + epsilon, features uncentred.

    The paper advises more rows than columns, about 25,600 rows; fewer give a lower bound of min(M,F).
    """
    return _entropy_rank(singular_values(features), epsilon)


def _entropy_rank(values: np.ndarray, epsilon: float = 0.0) -> float:
    if not values[0] > 0:
        return 0.0
    shares = values / values.sum() + epsilon
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def spread(features: np.ndarray) -> dict[str, float]:
    """Signs of a constant encoder, over unit features u_i [M,F].

    std: mean over columns of the standard deviation over examples (1/sqrt(F) when directions are uniform);
    mean_cosine: mean of u_i . u_j over pairs i != j, = (M |mean u|^2 - mean |u_i|^2) / (M - 1); 1 for a single row.
    """
    unit = unit_rows(check_rows(features, "features"))
    rows = len(unit)
    mean = unit.mean(axis=0)
    power = float(np.sum(np.square(unit)) / rows)  # 1 unless some rows are zero
    cosine = (rows * float(mean @ mean) - power) / (rows - 1) if rows > 1 else 1.0
    return {"std": float(unit.std(axis=0).mean()), "mean_cosine": cosine}


def rank_summary(features: np.ndarray) -> dict[str, float | int]:
    """Everything above for one matrix: {'effective', 'effective_uncentred', 'rankme', 'attainable', 'std',
    'mean_cosine'}. attainable = min(M - 1, F): the largest centred rank that M rows of width F can have."""
    rows, width = check_rows(features, "features").shape
    values = singular_values(features)
    return {
        "effective": effective_rank(features, centred=True),
        "effective_uncentred": _entropy_rank(values),
        "rankme": _entropy_rank(values, 1e-7),
        "attainable": max(min(rows - 1, width), 1),
        **spread(features),
    }
