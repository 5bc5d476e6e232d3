"""protojax: train encoders against prototypes that do not collapse.

`protojax.load(workdir)` gives a trained encoder; `python -m protojax.main --config=quickstart` trains one.
Reading order: train.py, step.py, api.py, then one of estimators/, objectives/, models/, data/, evals/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from protojax.loading import load


def __getattr__(name: str) -> Any:
    # Imported when first used: `protojax --version` should not wait for JAX.
    if name == "load":
        from protojax.loading import load

        return load
    raise AttributeError(f"module 'protojax' has no attribute {name!r}")
