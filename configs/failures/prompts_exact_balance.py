"""The published recipe under an exactly balanced E-step: inference still has one winner.

Fires: train_infer_gap

    protojax train --config=failures/prompts_exact_balance --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.prompts("exact_balance", "original_k8", argument)
    c.method.prompts.balance = "sinkhorn"
    return c
