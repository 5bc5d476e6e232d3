"""Networks: layers are Flax NNX, what leaves this package is a pair of pure functions.

Read `functional.py` first (NNX module -> `init`/`apply` over plain dicts), then `encoder.py` (backbone + head over
views -> `api.Encoder`).
"""

from protojax.models.encoder import BACKBONES, HEADS, count_parameters, make_encoder
from protojax.models.functional import Functional, functional

__all__ = ["BACKBONES", "HEADS", "Functional", "count_parameters", "functional", "make_encoder"]
