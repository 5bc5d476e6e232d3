"""Estimators: what moves the prototypes. Each function returns an `api.Estimator`.

joint: `learned`; partial: `capi`; decoupled: `mixture`, `balanced`; control: `frozen`. `with_logit_center` adds DINO's
centre to any of them.
"""

from protojax.estimators.balanced import balanced
from protojax.estimators.capi import capi
from protojax.estimators.common import LOCAL, Engine, describe
from protojax.estimators.learned import frozen, learned
from protojax.estimators.logit_center import with_logit_center
from protojax.estimators.mixture import mixture

__all__ = ["LOCAL", "Engine", "balanced", "capi", "describe", "frozen", "learned", "mixture", "with_logit_center"]
