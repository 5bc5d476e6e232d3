"""The arms of the prototype experiments, in one place: what differs between them is a few lines each.

joint: the optimiser moves the prototypes with the encoder. partial: a teacher-side clustering head with its own loss
(CAPI-like). decoupled: online EM alone moves them. frozen: nobody does (control). The rest are ablations of decoupled.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from protojax.config import component

Change = Callable[[ml_collections.ConfigDict], None]


def _estimator(name: str, **options: object) -> Change:
    def change(c: ml_collections.ConfigDict) -> None:
        old = c.method.estimator
        c.method.estimator = component(name, components=old.components, **options)
        if name != "capi" and "features" in old:  # capi reads unit features always
            c.method.estimator.features = old.features

    return change


def _mixture_option(**options: object) -> Change:
    def change(c: ml_collections.ConfigDict) -> None:
        if c.method.estimator.name != "mixture":
            ARMS["mixture"](c)
        for k, v in options.items():
            c.method.estimator[k] = v

    return change


def _dino(c: ml_collections.ConfigDict) -> None:
    """DINO's loss, unit features and centred teacher logits in place of CARP's."""
    c.method.objective = ml_collections.ConfigDict({"dino": {"weight": 1.0}})
    c.method.head = component(
        "dino", **{k: v for k, v in c.method.head.items() if k in ("layers", "hidden", "dim", "whiten")}
    )
    c.method.logit_center = 0.9
    if "features" in c.method.estimator or c.method.estimator.name in ("mixture", "learned", "frozen"):
        c.method.estimator.features = "unit"


def _swav(c: ml_collections.ConfigDict) -> None:
    """SwAV's loss on unit features, with balanced targets: over the estimator's queue if it has one, or the batch."""
    c.method.estimator.features = "unit"
    own = c.method.estimator.name == "queue_sinkhorn"
    c.method.objective = ml_collections.ConfigDict({"swav": {"weight": 1.0, "iterations": 0 if own else 3}})


def _joint_swav(c: ml_collections.ConfigDict) -> None:
    _estimator("queue_sinkhorn")(c)
    _swav(c)


def _joint_koleo(c: ml_collections.ConfigDict) -> None:
    _estimator("learned")(c)
    c.method.objective.koleo_proto = ml_collections.ConfigDict({"weight": 0.1})


def _joint_dino(c: ml_collections.ConfigDict) -> None:
    _estimator("learned")(c)
    _dino(c)


def _changed(part: ml_collections.ConfigDict, **options: object) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict({**part, **options}, convert_dict=False)


ARMS: dict[str, Change] = {
    "decoupled": lambda c: None,
    "joint": _estimator("learned"),
    "partial": _estimator("capi"),
    "frozen": _estimator("frozen"),
    "joint_koleo": _joint_koleo,
    "mixture": _estimator("mixture", covariance="spherical"),
    "balanced": _estimator("balanced"),
    "uniform_forgetting": _mixture_option(forgetting="uniform"),
    "no_centering": _mixture_option(center=False),
    "decoupled_dino": _dino,
    "joint_dino": _joint_dino,
    "decoupled_swav": _swav,
    "joint_swav": _joint_swav,
    "spherical_kmeans": _estimator("spherical_kmeans"),
    "periodic_kmeans": _estimator("periodic_kmeans"),
    "von_mises_fisher": _estimator("von_mises_fisher"),
    "variational": _estimator("variational"),
    "coupled": _estimator("coupled", coupling=0.5),
}


def published_carp(c: ml_collections.ConfigDict, prototypes: int) -> None:
    """CARP's recipe for ResNet-50 (Silva & Ramirez Rivera 2023) at c.data.batch_size, on an accelerator, with a mixture
    in place of learned prototypes."""
    c.method.dtype = "bfloat16"
    c.method.backbone = component("resnet50", stem="imagenet")
    c.method.head = component("carp")
    c.method.views = component("carp")
    c.method.estimator = component("mixture", components=prototypes, features="raw")
    c.method.objective = ml_collections.ConfigDict({"carp": {"block": 512}})
    c.method.optim = component("lars", peak_lr=0.45 * c.data.batch_size / 256, end_lr=0.0048, weight_decay=1e-6)
    c.method.teacher.start = 0.99
    c.run.log_every = 50
    c.run.checkpoint_every = 0.01


def apply(c: ml_collections.ConfigDict, arm: str) -> ml_collections.ConfigDict:
    """Turn a decoupled configuration into the arm; sets c.arm."""
    ARMS[arm](c)
    c.arm = arm
    return c


def smoke(c: ml_collections.ConfigDict) -> None:
    """Two steps at the smallest sizes on synthetic images: everything runs, nothing is learned, no file is needed."""
    c.name += "_smoke"
    c.data.source = component("synthetic", classes=4, size=64, side=32)
    c.data.root = None
    c.data.train_split, c.data.test_split = "train", "test"
    c.data.batch_size, c.evals.batch_size = 16, 32
    c.evals.labels, c.evals.knn_k, c.evals.every = ("fine",), (1, 5), 1.0
    c.method.epochs, c.method.steps = None, 2
    # bfloat16 is for accelerators; jaxlib 0.12 on CPUs compiles its residual blocks (YNN fusions) to NaN.
    c.method.dtype = "float32"
    c.method.backbone = component("resnet_micro")
    head = c.method.head
    c.method.head = _changed(head, hidden=32, dim=16)
    views = c.method.views
    count = min(views.get("local_count", 2), 2)
    c.method.views = _changed(views, local_count=count, global_size=32, local_size=16)
    c.method.estimator.components = 64
    if "carp" in c.method.objective:
        c.method.objective.carp.block = 32
    c.run.log_every = 1
