"""Features whose modes are known: the sets on which mixtures of prompts are accepted.

With unit vectors mu (the image cone) and nu (off it, orthogonal to mu: the modality gap), class directions m_c, mode
directions a_cm, and e ~ N(0, I/D):

    x      = unit(0.75 mu + class_gain m_c + mode_gain a_cm + noise e)
    base_c = unit(0.8 nu + 0.35 mu + 0.35 m_c + 0.1 random unit)

A share `xor` of the classes comes in pairs with one m_c, whose modes are +-(a+b) for one and +-(a-b) for the other
(over sqrt 2): their class means are equal, so that one prompt a class cannot tell them apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri

from protojax.config import suggest
from protojax.data import seeding
from protojax.data.prompts_cache import FeatureCache, Features

WIDTH = 512


class Preset(NamedTuple):
    """classes C, modes M, prompts K, images a class for training and test, batch, noise, skew of the mode weights."""

    classes: int
    modes: int
    prompts: int
    train: int
    test: int
    batch: int
    noise: float = 0.35
    skew: float = 0.0
    class_gain: float = 0.45
    mode_gain: float = 0.35


PRESETS = {
    "small": Preset(20, 4, 8, 33, 100, 16),
    "standard": Preset(20, 4, 8, 128, 100, 32, skew=0.35),
    "matched": Preset(20, 8, 8, 128, 100, 32),
    "wide": Preset(20, 8, 32, 512, 100, 128, skew=0.35),
    "hard": Preset(40, 4, 8, 64, 200, 32, noise=0.9, skew=0.35, class_gain=0.3, mode_gain=0.3),
}


def preset(name: str) -> Preset:
    """A preset by name. Raises ValueError with the known ones."""
    if name not in PRESETS:
        raise ValueError(f"synthetic_modes, preset: expected one of {list(PRESETS)}, got {name!r}"
                         f"{suggest(name, PRESETS)}.")  # fmt: skip
    return PRESETS[name]


def synthetic_modes(name: str = "standard", *, seed: int = 0, width: int = WIDTH, xor: float = 0.5,
                    **changes: Any) -> FeatureCache:  # fmt: skip
    """A synthetic cache with splits 'train', 'val' and 'test', modes known; `changes` replace fields of the preset.

    Raises ValueError for an unknown preset or field, an odd number of modes with xor > 0, and xor outside [0, 1].
    """
    chosen = preset(name)
    for field in changes:
        if field not in chosen._fields:
            raise ValueError(f"synthetic_modes has no option {field!r}{suggest(field, chosen._fields)}.")
    chosen = chosen._replace(**changes)
    if not 0 <= xor <= 1:
        raise ValueError(f"synthetic_modes, xor: expected a share in [0, 1], got {xor}.")
    pairs = round(xor * chosen.classes / 2)
    if pairs and chosen.modes % 2:
        raise ValueError(f"synthetic_modes: modes come in pairs +-a with xor > 0, got {chosen.modes} of them.")
    world = _world(chosen, pairs, width, seed)
    splits = {
        split: _draw(chosen, world, number, width, seed, 10 + i)
        for i, (split, number) in enumerate((("train", chosen.train), ("val", 16), ("test", chosen.test)))
    }
    names = tuple(f"class {c:02d}" for c in range(chosen.classes))
    family = tuple(f"family {_shared(c, pairs):02d}" for c in range(chosen.classes))
    return FeatureCache(f"synthetic_{name}", splits, world["base"], names, {"family": family}, f"{name}/{seed}")


def _shared(c: int, pairs: int) -> int:
    """Index of a class's direction: paired classes share one."""
    return c // 2 if c < 2 * pairs else c - pairs


def _world(p: Preset, pairs: int, width: int, seed: int) -> dict[str, np.ndarray]:
    mu, nu = _directions(2, width, seed, 0)
    nu = nu - (nu @ mu) * mu
    nu /= np.linalg.norm(nu)
    directions = _directions(p.classes - pairs, width, seed, 1)
    classes = directions[[_shared(c, pairs) for c in range(p.classes)]]
    modes = _directions(p.classes * p.modes, width, seed, 2).reshape(p.classes, p.modes, width)
    for pair in range(pairs):
        for m in range(0, p.modes, 2):
            a, b = modes[2 * pair, m].copy(), modes[2 * pair, m + 1].copy()
            plus, minus = (a + b) / np.sqrt(2.0), (a - b) / np.sqrt(2.0)
            modes[2 * pair, m], modes[2 * pair, m + 1] = plus, -plus
            modes[2 * pair + 1, m], modes[2 * pair + 1, m + 1] = minus, -minus
    own = _directions(p.classes, width, seed, 3)
    base = 0.8 * nu + 0.35 * mu + 0.35 * classes + 0.1 * own
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    return {"mu": mu, "classes": classes, "modes": modes, "base": base.astype(np.float32)}


def _draw(p: Preset, world: dict[str, np.ndarray], number: int, width: int, seed: int, stream: int) -> Features:
    label = np.repeat(np.arange(p.classes), number)
    weight = np.exp(-p.skew * np.arange(p.modes))
    edges = np.cumsum(weight / weight.sum())
    mode = np.minimum(np.searchsorted(edges, _uniform(len(label), seed, stream, 0), side="right"), p.modes - 1)
    noise = _normal(len(label) * width, seed, stream, 1).reshape(-1, width) / np.sqrt(width)
    x = 0.75 * world["mu"] + p.class_gain * world["classes"][label]
    x = x + p.mode_gain * world["modes"][label, mode] + p.noise * noise
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Features(x.astype(np.float32), label.astype(np.int32), mode.astype(np.int32))


def _uniform(size: int, seed: int, *stream: int) -> np.ndarray:
    words = seeding.raw_stream(size, seed, seeding.SYNTHETIC, 6, *stream)
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _normal(size: int, seed: int, *stream: int) -> np.ndarray:
    return np.asarray(ndtri(_uniform(size, seed, *stream)))


def _directions(count: int, width: int, seed: int, stream: int) -> np.ndarray:
    rows = _normal(count * width, seed, stream).reshape(count, width)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
