"""The five interfaces that every workload is made of, and nothing else.

A method is a :class:`Recipe`: a `Source` of examples, `views` of them, an `Encoder`, an `Estimator` that moves the
prototypes, an `Objective` that moves the encoder, and a list of `Evaluation`s. All are named tuples of pure
functions (as in optax): no hidden state, nothing to subclass. `train.py` knows these types and no workload.

Letters (docs/notation.md): B images, V views, N rows (B*V or tokens), D embedding width, F backbone width,
K prototypes, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array
Key = jax.Array
PyTree = Any
Batch = dict[str, Any]
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count): sums add over devices, micro-batches and steps


# ---------------------------------------------------------------------------------------------------- source
class SourceSpec(NamedTuple):
    """What a source yields.

    size: examples in the split. batch_size: *global* batch B. steps_per_epoch: batches that visit each example once
    (the last may be partial: `mask` is False on its padding). shapes: per-example `ShapeDtypeStruct` of every key of
    a batch, without the batch axis. classes: for each label key, the class names in label order. counts: for each
    label key, how many *training* examples each class has (numpy int64 [C]), what head/medium/tail are defined by.
    """

    name: str
    size: int
    batch_size: int
    steps_per_epoch: int
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    classes: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, np.ndarray]


class Source(NamedTuple):
    """Examples, addressed by step.

    batch(step) -> dict of numpy arrays, first axis B_local = this process's rows of the global batch. A pure function
    of `step`: resuming needs no iterator state. Always holds `index [B] int64` (position in the split) and
    `mask [B] bool` (False on padding rows).
    """

    spec: SourceSpec
    batch: Callable[[int], dict[str, np.ndarray]]


# --------------------------------------------------------------------------------------------------- encoder
class Encoder(NamedTuple):
    """A network as two pure functions.

    init(key, inputs) -> {'params': tree, 'stats': tree} (stats: batch-norm running moments, possibly empty).
    apply(variables, inputs, train, key) -> (embeddings, stats): embeddings has fixed names and shapes: `image
    [V,B,D]` what the objective sees, `backbone [V,B,F]` what evaluations see; tokens, text likewise for other
    workloads. With train=False stats is returned unchanged. key=None: nothing random (no drop path) in training mode.
    """

    init: Callable[[Key, PyTree], PyTree]
    apply: Callable[[PyTree, PyTree, bool, Key | None], tuple[dict[str, Array], PyTree]]


# ------------------------------------------------------------------------------------------------- estimator
class Codebook(NamedTuple):
    """Prototypes as the losses see them: logit of row h for prototype k is (h . prototypes_k + bias_k) / temperature.

    prototypes [K,D] (unit rows unless the estimator says otherwise); bias [K], in units of h . prototypes: DINO's
    negative centre, or minus mean-feature . prototype when the estimator centres features. A bias of OFF or less: the
    prototype is switched off (an estimator whose number of prototypes the data decide); no row may be assigned to it.
    """

    prototypes: Array
    bias: Array


# Bias of a prototype that is switched off: exp(OFF / temperature) is zero at every temperature in use, and float32
# still tells logits of this size apart by a hundredth.
OFF = -1e4


class EstimatorSpec(NamedTuple):
    """dim: D. rows: teacher rows N seen at a step (global). total_steps: length of the run, for schedules. constants:
    the recipe's frozen arrays, for heads that start from data."""

    dim: int
    rows: int
    total_steps: int
    constants: Any = None


class Estimator(NamedTuple):
    """Learns prototypes from teacher features without gradients through the encoder (joint arms: the optimiser does).

    init(key, spec) -> S: arrays below `S['components']` lead with the axis that is sharded on the mesh (K, or C for
        prompts), below `S['memory']` with rows; everything else is replicated.
    statistics(S, rows) -> stats: rows = {'features' [N,D], 'mask' [N], ...}; sums over rows, so that sharding, masking
        and micro-batches are free.
    update(S, stats, rows, step, key) -> (S, info): M-step, forgetting, memory. info: Metrics.
    codebooks(S, head) -> (target, prediction): what the teacher and the student are scored against. No gradient
        enters S; `head` carries one where prototypes are learned.
    head(key, spec) -> the learnable part of the prototypes ({} when decoupled): params['head']['prototypes'].
    start_rows: how many teacher rows `start` wants before the first step (0: no data start).
    start(S, rows, key) -> S: initialisation from data.
    """

    init: Callable[[Key, EstimatorSpec], PyTree]
    statistics: Callable[[PyTree, Mapping[str, Array]], PyTree]
    update: Callable[[PyTree, PyTree, Mapping[str, Array], Array, Key], tuple[PyTree, Metrics]]
    codebooks: Callable[[PyTree, PyTree], tuple[Codebook, Codebook]]
    head: Callable[[Key, EstimatorSpec], PyTree]
    start_rows: int
    start: Callable[[PyTree, Mapping[str, Array], Key], PyTree]


# ------------------------------------------------------------------------------------------------- objective
class Objective(NamedTuple):
    """Turns embeddings into a scalar.

    requires: names that `inputs` must hold; checked when the recipe is built. inputs: `student`, `teacher`
    (embeddings dicts; {} without a teacher), `target`, `prediction` (Codebooks; None without an estimator),
    `estimator` (its state), `mask [B]`, `batch`, `head` (all head parameters), `step`, `key`.
    init(key, spec) -> params['head']['objective'] (often {}). loss(params, inputs) -> (scalar, Metrics).
    terms(params, inputs) -> {name: (weight, weighted value)}, which sum to the loss: what the gradient probe takes
    apart (None: one term).
    """

    requires: frozenset[str]
    init: Callable[[Key, EstimatorSpec], PyTree]
    loss: Callable[[PyTree, Mapping[str, Any]], tuple[Array, Metrics]]
    terms: Callable[[PyTree, Mapping[str, Any]], dict[str, tuple[Array, Array]]] | None = None


# ------------------------------------------------------------------------------------------------ evaluation
class FeatureBank(NamedTuple):
    """Features of one split, one centre view an image, padding removed, in split order.

    backbone [M,F] float32 (evaluations); image [M,D] float32 (the space prototypes live in), of width 0 where the
    encoder gives no such embedding; labels: label key -> int64 [M]; positions int64 [M]: where in the split; other
    embeddings by name, and the entries of a batch that the recipe keeps, in `extra`.
    """

    backbone: np.ndarray
    image: np.ndarray
    labels: Mapping[str, np.ndarray]
    positions: np.ndarray
    extra: Mapping[str, np.ndarray]


class Probe(NamedTuple):
    """What an evaluation may look at. bank(split) computes once and remembers; `initial` holds the metrics that the
    same evaluations gave right after initialisation (empty at step 0). codebook: what the estimator calls its target
    (None: no estimator). head() -> params['head'] on the host; encode(batch) -> embeddings of any batch."""

    step: int
    bank: Callable[[str], FeatureBank]
    specs: Mapping[str, SourceSpec]
    codebook: Codebook | None
    info: Mapping[str, Any]
    initial: Mapping[str, Any]
    head: Callable[[], PyTree] = dict
    encode: Callable[[Batch], dict[str, np.ndarray]] | None = None


class Evaluation(NamedTuple):
    """name; run(probe, key) -> nested dict of plain numbers (ready for JSON): the same in training and afterwards."""

    name: str
    run: Callable[[Probe, Key], dict[str, Any]]


# ---------------------------------------------------------------------------------------------------- recipe
class Stopping(NamedTuple):
    """End a run early: at the evaluation after which `metric` (its path in the record, 'soft_labels/val/skill') has not
    risen above its best, nor above `floor`, for `patience` evaluations. The last state is the one that is reported."""

    metric: str
    patience: int
    floor: float = 0.0


class Recipe(NamedTuple):
    """Everything `train.run` needs; built by `experiment.build`, the only place that maps names to code.

    sources: 'train' (shuffled), and one ordered pass per split for evaluation: 'bank', 'test', ...
    views(key, batch) -> inputs of the student (on the device, inside the step). teacher_views(inputs) -> the part of
    them that the teacher sees. plain_view(batch) -> inputs for evaluation (one centre view, V = 1).
    teacher: the student's network as the teacher runs it (no drop path); same parameters. None: there is no EMA copy
    and no second forward pass, and evaluations look at the student.
    estimator: None where nothing is learned without gradients; then `rows` is not called and there is no codebook.
    rows(embeddings, batch, head) -> rows for the estimator, from the teacher's embeddings; without a teacher, from the
    student's inputs in their place.
    schedules: scalars that are pure functions of the step, logged beside the metrics; 'momentum' (EMA coefficient of
    the teacher) must be there when there is a teacher. describe(S) -> what evaluations may know about the estimator
    ('usage' [K], 'center'). diagnose(records, options) -> findings in the history of a run.

    seed: of all random streams; inside compiled functions an argument (`step.Constants`), not part of the program.
    constants: frozen arrays (towers, banks): an argument of the compiled step, never closed over and never saved. All
    functions of a batch find them in batch['constants']; initialisations in spec.constants.
    keep: entries of a batch that feature banks hold beside embeddings. spec: D and N where they cannot be read off the
    rows that a teacher gives. clip_norm: the optimiser's, for the rate of clipped steps. stopping: None: to the end.
    subtrees(params) -> named parts whose gradient norm is logged (None: two levels of the tree). micro_batches: parts
    that a batch is encoded in (`accumulation`). best: the metric (its path in an evaluation, higher is better) whose
    best state is kept beside the newest ones; '': none.
    """

    sources: Mapping[str, Source]
    views: Callable[[Key, Batch], PyTree]
    teacher_views: Callable[[PyTree], PyTree]
    plain_view: Callable[[Batch], PyTree]
    encoder: Encoder
    teacher: Encoder | None
    estimator: Estimator | None
    objective: Objective
    rows: Callable[[Mapping[str, Array], Batch, PyTree], dict[str, Array]] | None
    optimizer: Any  # optax.GradientTransformation
    schedules: Mapping[str, Callable[[Array], Array]]
    evaluations: tuple[Evaluation, ...]
    describe: Callable[[PyTree], dict[str, Array]]
    diagnose: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
    total_steps: int
    seed: int | Array
    constants: PyTree = None
    keep: tuple[str, ...] = ()
    spec: EstimatorSpec | None = None
    clip_norm: float | None = None
    stopping: Stopping | None = None
    subtrees: Callable[[PyTree], dict[str, PyTree]] | None = None
    micro_batches: int = 1
    best: str = ""


class TrainState(NamedTuple):
    """All that a checkpoint holds. params = {'encoder': tree, 'head': {'prototypes': ..., 'objective': ...}};
    teacher = {'params': EMA of params, 'stats': its batch-norm moments}, or {} without a teacher; estimator: {} without
    one. No RNG keys: they are folded from (seed, stream, step)."""

    step: Array
    params: PyTree
    stats: PyTree
    teacher: PyTree
    opt: PyTree
    estimator: PyTree
