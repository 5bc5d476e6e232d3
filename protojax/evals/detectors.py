"""What goes wrong with prototypes, said in plain words: one table of detectors, and `diagnose`.

A detector is a pure function of the history of a run (`History`: metrics of the steps and of the evaluations). It
either stays silent or returns the numbers that it saw; the table adds the sentence for a person: what was seen, what
it usually means, what to try. Ids and thresholds live here alone, each threshold with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from protojax.evals import detector_checks as checks
from protojax.evals import detectors_alignment, detectors_prompts, detectors_soft_labels
from protojax.evals.detector_types import SEVERITIES, Detector, Threshold
from protojax.evals.history import History

_SOON = "fewer steps show the initialisation, not what training made of it"

# In order of consequence: what is first makes what is below meaningless. These are for every workload and for
# prototypes; those of the other workloads are in a file each.
GENERAL: tuple[Detector, ...] = (
    Detector(
        "not_finite", "error", {}, ("loss/", "grad_norm", "update_norm", "estimator/"), checks.not_finite,
        "{name} is NaN or infinite since step {since}.",
        "The optimisation diverged: the learning rate is too high for the warm-up, or an input holds NaN.",
        "Lower config.method.optim.peak_lr or lengthen its warm-up, set clip_norm, and look at the input at that step; "
        "the last finite checkpoint is kept.",
    ),
    Detector(
        "encoder_collapse", "error",
        {
            "share": Threshold(0.10, "below a tenth of the attainable rank nine directions of ten are wasted"),
            "steps": Threshold(50, _SOON),
        },
        ("effective_rank", "rank/image/"), checks.encoder_collapse,
        "The effective rank of the features is {rank:.1f} of {attainable:.0f} attainable; it was {initial:.1f} right "
        "after initialisation.",
        "The encoder maps images into a few directions, whatever the prototypes look like.",
        "Raise the weight of the regulariser (config.method.objective.*.weight), lower config.method.optim.peak_lr, "
        "raise config.method.teacher.start, or use more and stronger views (config.method.views).",
    ),
    Detector(
        "constant_side", "error",
        {
            "std": Threshold(1e-3, "unit features of width D spread by 1/sqrt(D), above 0.01 for every usual D"),
            "rank": Threshold(1.5, "one direction has rank 1, two even ones have rank 2"),
            "cosine": Threshold(0.999, "a mean angle below 2.6 degrees between any two images"),
            "steps": Threshold(50, _SOON),
        },
        ("rank/image/",), checks.constant_side,
        "All images have almost the same feature: spread {std:.2g}, mean pairwise cosine {cosine:.4f}, effective rank "
        "{rank:.2f}.",
        "The encoder became constant, or its features share one direction that drowns the rest.",
        "Look at the input (blank or equal images?), then at the regulariser's weight "
        "(config.method.objective.*.weight), the learning rate and the batch norm of config.method.head.",
    ),
    Detector(
        "chance_loss", "error",
        {
            "band": Threshold(1e-2, "ln K - 0.01 needs assignments barely better than uniform ones"),
            "steps": Threshold(100, "long enough for every usual learning rate to leave the plateau"),
        },
        ("loss/",), checks.chance_loss,
        "{name} is {loss:.4f}, chance is {chance:.4f}, for {steps} steps.",
        "Student or teacher assignments are uniform: features too short for the temperature, targets too soft, or "
        "prototypes that are all alike.",
        "Lower the temperatures (config.method.objective.*.temperature), check that features are not all equal "
        "(effective_rank), raise config.method.estimator.beta sooner, raise config.method.optim.peak_lr.",
    ),
    Detector(
        "statistics_underflow", "error",
        {"share": Threshold(0.01, "one component in a hundred: above a single unlucky start")},
        ("estimator/underflow_share",), checks.statistics_underflow,
        "The mass of {share:.1%} of the components is below what float32 can hold.",
        "Components without data forget a share of their statistics every step, (1 - eta)^t, until nothing is left.",
        "Use forgetting by responsibility (config.method.estimator.forgetting), a lower config.method.estimator.eta, "
        "uniform weights, or revival (config.method.estimator.revive).",
    ),
    Detector(
        "dead_prototypes", "error",
        {
            "share": Threshold(0.50, "more than half of the capacity does nothing"),
            "rise": Threshold(0.02, "above the flicker of components at the edge of 1/(10 K)"),
            "checks": Threshold(3, "two evaluations make a difference, three a direction"),
            "steps": Threshold(100, "features leave their start within tens of steps and prototypes lag behind them"),
        },
        ("prototypes/live", "prototypes/count", "prototypes/rows"), checks.dead_prototypes,
        "{dead:.1%} of the {count:.0f} prototypes that {rows:.0f} images could use are dead (usage below 1/(10 K)), "
        "the least it has been is {least:.1%}.",
        "A few prototypes win every image: features share one direction, or the E-step lets the rich get richer.",
        "Balance the E-step (config.method.estimator: balanced with a memory of at least 2 K rows, or a usage price), "
        "centre the features (center), switch revival on (revive), or use fewer prototypes.",
    ),
    Detector(
        "duplicate_prototypes", "error",
        {
            "share": Threshold(0.90, "one live prototype in ten repeats another"),
            "copies": Threshold(2, "one or two copies are flicker, also among few prototypes"),
            "checks": Threshold(3, "three falls in a row are a trend, not noise"),
            "fall": Threshold(0.02, "a fall of one or two prototypes is flicker"),
            "levels": Threshold(0.75, "a last fall well below the mean one levels off, as after k-means++ seeds"),
            "steps": Threshold(50, _SOON),
        },
        ("prototypes/live", "prototypes/live_unique/0.025"), checks.duplicate_prototypes,
        "{unique:.0f} of {live:.0f} live prototypes are unique at epsilon 0.025 ({share:.1%}; it was {before:.1%}).",
        "Prototypes drift together: jointly learned ones take this shortcut early, mixtures do when responsibilities "
        "are too soft.",
        "Decouple the prototypes (arm=decoupled), sharpen the E-step (config.method.estimator.temperature), or add the "
        "terms koleo (features) or koleo_proto (joint prototypes) of config.method.objective.",
    ),
    Detector(
        "variance_floor", "warning",
        {"share": Threshold(0.50, "most components have no variance of their own left")},
        ("estimator/floor_share",), checks.variance_floor,
        "{share:.1%} of the variances are at their floor.",
        "Components have shrunk onto single rows, or the features' scale is below the floor.",
        "Tie the variances (config.method.estimator.covariance = 'tied'), lower "
        "config.method.estimator.variance_floor, or slow the forgetting (config.method.estimator.eta).",
    ),
    Detector(
        "one_hot_responsibilities", "warning",
        {
            "largest": Threshold(0.999, "the other K - 1 components share a thousandth"),
            "records": Threshold(3, "from the first records on: annealing never had an effect"),
            "perplexity": Threshold(0.25, "decided rows are wanted where all prototypes get work, not where few do"),
        },
        ("estimator/max_responsibility", "estimator/usage_perplexity", "prototypes/count"), checks.one_hot,
        "The mean largest responsibility is {largest:.4f} from step {first} on, while usage has perplexity "
        "{perplexity:.1f} of {count:.0f}.",
        "The E-step was decided before the means had moved: log-likelihoods differ by hundreds, so annealing and prior "
        "have no effect and the first winner stays.",
        "Start config.method.estimator.beta lower, raise config.method.estimator.variance_floor (or temperature), or "
        "read unit features (config.method.estimator.features = 'unit').",
    ),
    Detector(
        "dead_term", "warning",
        {
            "records": Threshold(3, "once may be chance: a hinge that was not reached"),
            "steps": Threshold(10, "neighbouring steps see almost the same parameters"),
        },
        ("grad_norm/", "weight/"), checks.dead_term,
        "The gradient of the term {term!r} is exactly 0 since step {since}, though its weight is not.",
        "The term cannot act: a clamp, a stop-gradient or a threshold that is never reached.",
        "Remove it from config.method.objective or correct its threshold.",
    ),
    Detector(
        "dead_parameter", "warning",
        {"steps": Threshold(50, "a rare branch may get no gradient for some batches, hardly for so many")},
        ("gradient/",), checks.dead_parameter,
        "The gradient of {names} is exactly 0 since step {since}.",
        "Nothing that is trained depends on these parameters: a stop-gradient in front of them, an output that no term "
        "reads, or units that never fire.",
        "Check which outputs the terms of config.method.objective read, and config.method.head and "
        "config.method.backbone for a part that is not used.",
    ),
    Detector(
        "nothing_learned", "warning",
        {
            "change": Threshold(0.02, "two per cent is what re-drawing the random initialisation changes"),
            "steps": Threshold(100, "earlier nothing need have moved"),
        },
        ("rank/image/mean_cosine", "prototypes/coverage", "prototypes/nearest_cosine/0.5", "update_norm"),
        checks.nothing_learned,
        "Nothing was learned: {what}.",
        "What looks like a result is the initialisation: gradient or learning rate is too small, or the term that "
        "should act is inert.",
        "Look at grad_norm and update_norm; raise config.method.optim.peak_lr; check the weights in "
        "config.method.objective.",
    ),
    Detector(
        "inert_term", "warning",
        {
            "share": Threshold(1e-9, "below float32's resolution of the total gradient"),
            "prompts_share": Threshold(1e-6, "mixtures of prompts: above a penalty that was measured inert"),
            "records": Threshold(3, "once may be chance"),
        },
        ("grad_norm/", "weight/"), checks.inert_term,
        "The gradient of the term {term!r} is {ratio:.1e} of the total since step {since}.",
        "The term has a weight but no influence.",
        "Raise its weight in config.method.objective or remove it.",
    ),
    Detector(
        "starving_input", "warning",
        {
            "share": Threshold(0.20, "a fifth of the accelerator's time"),
            "records": Threshold(3, "the first windows hold compilation and cold files"),
            "seconds": Threshold(10.0, "a busy moment of the machine passes, slow reading stays"),
            "wait": Threshold(0.01, "the interpreter changes threads every 5 ms, the kernel about as often: two turns"),
        },
        ("input_wait",), checks.starving_input,
        "The device waited for data during {share:.0%} of the last {seconds:.0f} seconds, {wait:.2g} s a step.",
        "Reading and decoding images is slower than the step.",
        "Raise config.system.prefetch, store smaller images, or keep the set in memory (npz source).",
    ),
)  # fmt: skip

# One table of all. A detector looks at the names of its own workload's metrics and is silent in every other run.
TABLE: tuple[Detector, ...] = (
    *GENERAL,
    *detectors_soft_labels.TABLE,
    *detectors_alignment.TABLE,
    *detectors_prompts.TABLE,
)
IDS = tuple(dict.fromkeys(detector.id for detector in TABLE))


def check_now(history: History, detector: Detector) -> dict[str, Any] | None:
    """One detector on a history: a finding {'detector', 'severity', 'step', 'evidence', 'cause', 'advice'} or None."""
    seen = detector.check(history, {name: t.value for name, t in detector.thresholds.items()})
    if seen is None:
        return None
    return {
        "detector": detector.id,
        "severity": seen.get("severity", detector.severity),
        "step": history.step,
        "evidence": detector.evidence.format(**seen),
        "cause": detector.cause,
        "advice": detector.advice,
    }


class Diagnosis:
    """Findings of a growing list of records; called again with more records, it reads only the new ones.

    A finding's step is that of its onset, its evidence the latest. One that has gone again stays as a 'notice'; a
    notice that becomes worse takes the new severity and step. Order: errors first, then order of consequence.
    """

    def __init__(self, warmup_steps: int = 0):
        self._warmup_steps = warmup_steps
        self._reset()

    def _reset(self) -> None:
        self._history = History(self._warmup_steps)
        self._found: dict[int, dict[str, Any]] = {}  # by detector: two tables may use one id
        self._read = 0
        self._newest: Any = None

    def __call__(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self._read > len(records) or (self._read and records[self._read - 1] is not self._newest):
            self._reset()  # another run, or one that was rewound
        for record in records[self._read :]:
            names = self._history.append(record)
            for detector in TABLE:
                if any(name.startswith(detector.reads) for name in names):
                    self._update(detector)
        self._read, self._newest = len(records), records[-1] if records else None
        order = {name: i for i, name in enumerate(IDS)}
        ranked = sorted(self._found.values(), key=lambda f: (SEVERITIES.index(f["severity"]), order[f["detector"]]))
        return [dict(finding) for finding in ranked]

    def _update(self, detector: Detector) -> None:
        now, before = check_now(self._history, detector), self._found.get(id(detector))
        if now is None:
            if before is not None and not before["evidence"].startswith("Gone"):
                text = f"Gone at step {self._history.step}: {before['evidence']}"
                self._found[id(detector)] = {**before, "severity": "notice", "evidence": text}
        elif before is None or before["severity"] != now["severity"]:
            self._found[id(detector)] = now
        else:
            self._found[id(detector)] = {**now, "step": before["step"]}


def diagnose(records: Iterable[Mapping[str, Any]], *, warmup_steps: int = 0) -> list[dict[str, Any]]:
    """Findings in the history of a run, most consequential first.

    records: dicts as in metrics.jsonl, {'kind': 'train' | 'eval', 'step', 'metrics': {...}, ...}, in order of step.
    warmup_steps: steps before which a loss at chance is only a notice. Returns a list of {'detector', 'severity'
    ('error', 'warning' or 'notice'), 'step' (onset), 'evidence', 'cause', 'advice'}; empty for a healthy run.
    """
    return Diagnosis(warmup_steps)([dict(record) for record in records])
