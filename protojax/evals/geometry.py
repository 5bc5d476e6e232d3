"""The shape of a feature cloud: uniformity, alignment of views, and LiDAR.

`views` are [M,V,D]: V random views of each of M images (`probing_views`). What one centre view an image can tell is in
`rank`.
"""

from __future__ import annotations

import numpy as np

from protojax.evals.neighbours import check_rows, unit_rows


def uniformity(features: np.ndarray, t: float = 2.0, *, block: int = 1024) -> float:
    """ln of the mean over pairs i < j of exp(-t |u_i - u_j|^2), u unit rows of features [M,D] (Wang and Isola 2020).

    0: all alike; the more uniform, the lower; at least -4 t. A zero row has distance 1 to every unit row. Exact, in
    blocks. Raises ValueError for fewer than two rows, t <= 0 or rows that are not finite.
    """
    unit = unit_rows(check_rows(features, "features"))
    if len(unit) < 2 or not t > 0:
        raise ValueError(f"uniformity: expected at least two rows and t > 0, got {len(unit)} rows and t = {t}.")
    squares = np.square(unit).sum(axis=1)
    total = 0.0
    for start in range(0, len(unit), block):
        part = slice(start, start + block)
        gaps = squares[part, None] + squares[None, start:] - 2.0 * (unit[part] @ unit[start:].T)
        kernel = np.exp(-t * np.maximum(gaps, 0.0))
        total += float(np.triu(kernel, 1).sum())
    return float(np.log(total / (len(unit) * (len(unit) - 1) / 2.0)))


def alignment(views: np.ndarray, alpha: float = 2.0) -> float:
    """Mean over images and pairs of their views of |u - v|^alpha, unit rows of views [M,V,D] (Wang and Isola 2020).

    0: views of an image coincide; 2 for alpha = 2 when they are unrelated. Raises ValueError for fewer than two views.
    """
    unit = _unit_views(views, "alignment")
    count = unit.shape[1]
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    return float(np.mean([np.linalg.norm(unit[:, a] - unit[:, b], axis=1) ** alpha for a, b in pairs]))


def lidar(views: np.ndarray, delta: float = 1e-4, epsilon: float = 1e-7) -> float:
    """LiDAR (Thilak et al. 2024): effective rank of what tells images apart, measured in units of how views differ.

    views x [M,V,D], mu_i the mean of image i's views, mu that of all. With S_b = mean_i (mu_i - mu)(mu_i - mu)' and
    S_w = mean_ij (x_ij - mu_i)(x_ij - mu_i)' + delta I, the eigenvalues l of S_w^-1/2 S_b S_w^-1/2 give
    exp(-sum_i p_i ln p_i), p_i = l_i / sum(l) + epsilon: between 1 and min(M - 1, D); 0 when all images coincide. The
    paper takes features as they are (not normalised), M = 1,000 and V = 10 to 50. Raises ValueError for fewer than two
    images or views, or delta <= 0.
    """
    images = _checked_views(views, "lidar")
    if len(images) < 2 or not delta > 0:
        raise ValueError(f"lidar: expected at least two images and delta > 0, got {len(images)} and delta = {delta}.")
    rows, width = images.shape[0] * images.shape[1], images.shape[2]
    means = images.mean(axis=1)
    apart = means - means.mean(axis=0)[None, :]
    if np.square(apart).sum() <= 1e-24 * np.square(means).sum():  # what is left is rounding of the mean
        return 0.0
    within = (images - means[:, None, :]).reshape(rows, width)
    scatter, basis = np.linalg.eigh(within.T @ within / rows)
    whitened = (apart @ basis) / np.sqrt(np.maximum(scatter, 0.0) + delta)[None, :]
    values = np.square(np.linalg.svd(whitened, compute_uv=False)) / len(images)
    shares = values / values.sum() + epsilon
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _unit_views(views: np.ndarray, name: str) -> np.ndarray:
    images = _checked_views(views, name)
    return unit_rows(images.reshape(-1, images.shape[2])).reshape(images.shape)


def _checked_views(views: np.ndarray, name: str) -> np.ndarray:
    views = np.asarray(views)
    if views.ndim != 3 or views.shape[1] < 2 or 0 in views.shape:
        raise ValueError(f"{name}: expected views [images, views >= 2, width], got shape {list(views.shape)}.")
    flat = check_rows(views.reshape(-1, views.shape[2]), f"{name}: views").astype(np.float64)
    return flat.reshape(views.shape)
