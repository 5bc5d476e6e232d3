"""Estimators: what moves the prototypes. Each function returns an `api.Estimator`.

joint: `learned`, `queue_sinkhorn` (SwAV); partial: `capi`; decoupled: `mixture`, `balanced`, and their rivals
`spherical_kmeans`, `periodic_kmeans`, `von_mises_fisher`, `variational`; between joint and decoupled: `coupled`;
control: `frozen`. `with_logit_center` adds DINO's centre to any of them, `with_coupling` the dial to a decoupled one.
"""

from protojax.estimators.balanced import balanced
from protojax.estimators.capi import capi
from protojax.estimators.common import LOCAL, Engine, describe
from protojax.estimators.coupled import coupled, with_coupling
from protojax.estimators.learned import frozen, learned
from protojax.estimators.logit_center import with_logit_center
from protojax.estimators.mixture import mixture
from protojax.estimators.periodic_kmeans import periodic_kmeans
from protojax.estimators.queue_sinkhorn import queue_sinkhorn
from protojax.estimators.spherical_kmeans import spherical_kmeans
from protojax.estimators.variational import variational
from protojax.estimators.von_mises_fisher import von_mises_fisher

__all__ = [
    "LOCAL",
    "Engine",
    "balanced",
    "capi",
    "coupled",
    "describe",
    "frozen",
    "learned",
    "mixture",
    "periodic_kmeans",
    "queue_sinkhorn",
    "spherical_kmeans",
    "variational",
    "von_mises_fisher",
    "with_coupling",
    "with_logit_center",
]
