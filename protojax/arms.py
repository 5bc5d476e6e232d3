"""The arms of the prototype experiments, in one place: what differs between them is a few lines each.

joint: the optimiser moves the prototypes with the encoder. partial: a teacher-side clustering head with its own loss
(CAPI-like). decoupled: online EM alone moves them. frozen: nobody does (control). The rest are ablations of decoupled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import ml_collections

from protojax.config import component

Change = Callable[[ml_collections.ConfigDict], None]

# Estimators that nothing of whole images goes into: prototypes follow the gradient, nobody, or the views themselves.
_OF_VIEWS = ("learned", "frozen", "capi", "queue_sinkhorn", "coupled")


def _estimator(name: str, *, views: bool = False, **options: object) -> Change:
    """Another estimator of as many components; views: it reads the views even where the default reads whole images."""

    def change(c: ml_collections.ConfigDict) -> None:
        old = c.method.estimator
        if views or name in _OF_VIEWS:
            c.method.rows = "views"
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


def _in_place_of_carp(c: ml_collections.ConfigDict, name: str, **options: object) -> None:
    """Another loss; what stands beside CARP's stays."""
    others = {k: v for k, v in c.method.objective.items() if k != "carp"}
    c.method.objective = ml_collections.ConfigDict({name: options, **others})


def _dino(c: ml_collections.ConfigDict) -> None:
    """DINO's loss, unit features and centred teacher logits in place of CARP's."""
    _in_place_of_carp(c, "dino", weight=1.0)
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
    _in_place_of_carp(c, "swav", weight=1.0, iterations=0 if own else 3)


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
    # The paper's recipe where it says what it is; initialisation and schedule are ours (it does not give them).
    "paper": _estimator(
        "mixture", views=True, covariance="diag", start="random", center=False, beta=("linear", 0.5, 1.0, 0.0, 0.3)
    ),
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


# What a network of images of about 32 px comes with: its options, the head's widths, its learning rate and dtype.
NETWORKS: dict[str, dict[str, Any]] = {
    "micro": {"backbone": component("resnet_micro"), "widths": (256, 64), "peak_lr": 4e-3, "dtype": "float32"},
    "resnet18": {
        "backbone": component("resnet18", stem="cifar"), "widths": (1024, 128), "peak_lr": 2e-3, "dtype": "bfloat16",
    },
    "vit_micro": {"backbone": component("vit_micro"), "widths": (256, 64), "peak_lr": 1e-3, "dtype": "float32"},
    "vit_ti": {
        "backbone": component("vit_ti", patch_size=4, image_size=32), "widths": (1024, 128), "peak_lr": 1e-3,
        "dtype": "bfloat16",
    },
}  # fmt: skip


def small_images(c: ml_collections.ConfigDict, prototypes: int, network: str = "micro") -> None:
    """The one default for images of about 32 px, whatever they show: head, views, balanced estimator, CARP's loss.

    Only what the data set is made of differs between data sets (where it is, K, how long), and only what a network
    needs differs between networks (`NETWORKS`)."""
    found = NETWORKS[network]
    hidden, dim = found["widths"]
    c.method.dtype = found["dtype"]
    c.method.backbone = found["backbone"].copy_and_resolve_references()
    # Whitened: in so short a run features else contract to 15 of 64 directions, and any codebook that follows them.
    c.method.head = component("carp", hidden=hidden, dim=dim, normalise=True, whiten=5)
    # Colour tells groceries apart: the published hue, grey and solarise would train it away.
    c.method.views = component(
        "multicrop",
        global_size=32,
        local_count=0,
        jitter=(0.4, 0.4, 0.2, 0.02),
        grey_probability=0.0,
        solarise_probability=(0.0, 0.0),
        blur_sigma=(0.1, 0.5),
    )
    # Prototypes are for whole images, and so is the audit: fitted to crops, some answer for crops alone.
    c.method.rows = "plain"
    # Sharp from the first step. Annealed (blunt first, prototypes close together) the encoder learns little in the
    # first quarter of the run, and ends no better: docs/results/diversity_omniglot.md.
    # every=0: as often as the memory turns over, so that the sweep's share of a step does not grow with K squared.
    c.method.estimator = component(
        "balanced",
        components=prototypes,
        features="unit",
        start_sweeps=10,
        every=0,
        temperature=0.005,
    )
    # KoLeo, as in DINOv2: consistency alone contracts the images of a class to less than prototypes can tell apart.
    c.method.objective = ml_collections.ConfigDict(
        {"carp": {"block": 128, "temperature": 0.1}, "koleo": {"weight": 0.5}}
    )
    c.method.optim = component("adamw", peak_lr=found["peak_lr"], weight_decay=0.05, warmup_fraction=0.1)
    c.method.teacher.start = 0.98


def at_batch(c: ml_collections.ConfigDict, size: int) -> None:
    """The same training at another batch size: as many images seen, with the two rules that keep it the same.

    Steps times old / new; the learning rate by the square root of new / old (Adam's step does not grow with the batch,
    its noise falls with the root: Malladi et al. 2022); the teacher's momentum to the power new / old, so that its
    memory is as long in images. Everything of the estimator is left as it is: it counts in shares and sweeps."""
    ratio = size / c.data.batch_size
    c.data.batch_size = size
    if c.method.steps:
        c.method.steps = round(c.method.steps / ratio)
    c.method.optim.peak_lr = c.method.optim.peak_lr * ratio**0.5
    c.method.teacher.start = c.method.teacher.start**ratio


def masked_patches(c: ml_collections.ConfigDict) -> None:
    """iBOT's loss on masked patches beside the arm's own, whatever the arm: for backbones with patches (a vit_*)."""
    c.method.objective.ibot = ml_collections.ConfigDict({"weight": 1.0})
    c.arm += "_ibot"


def apply(c: ml_collections.ConfigDict, arm: str, flags: Collection[str] = ()) -> None:
    """Turn a decoupled configuration into the arm, with `ibot` and `smoke` where they are among its flags; sets
    c.arm."""
    ARMS[arm](c)
    c.arm = arm
    if "ibot" in flags:
        masked_patches(c)
    if "smoke" in flags:
        smoke(c)


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
    c.method.backbone = component("vit_micro" if "ibot" in c.method.objective else "resnet_micro")
    head = c.method.head
    c.method.head = _changed(head, hidden=32, dim=16)
    views = c.method.views
    count = min(views.get("local_count", 2), 2)
    c.method.views = _changed(views, local_count=count, global_size=32, local_size=16)
    c.method.estimator.components = 64
    if "carp" in c.method.objective:
        c.method.objective.carp.block = 32
    c.run.log_every = 1
