"""protojax: train encoders against prototypes that do not collapse.

`python -m protojax.main --config=quickstart` trains an encoder; `protojax.load(workdir)` gives it to other code;
`protojax.OnlineGaussianMixture` is the mixture behind it as a scikit-learn estimator.
Reading order: train.py, step.py, api.py, then one of estimators/, objectives/, models/, data/, evals/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["OnlineGaussianMixture", "__version__", "load"]

if TYPE_CHECKING:
    from protojax.loading import load
    from protojax.online_mixture import OnlineGaussianMixture


def __getattr__(name: str) -> Any:
    # Imported when first used: `protojax --version` should not wait for JAX.
    if name == "load":
        from protojax.loading import load

        return load
    if name == "OnlineGaussianMixture":
        from protojax.online_mixture import OnlineGaussianMixture

        return OnlineGaussianMixture
    raise AttributeError(f"module 'protojax' has no attribute {name!r}")
