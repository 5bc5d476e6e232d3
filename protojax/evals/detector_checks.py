"""The checks behind the table in `detectors`: (history, thresholds) -> numbers that were seen, or None for silence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from protojax.evals.history import History, Point

Thresholds = Mapping[str, float]
Seen = dict[str, Any] | None


# ------------------------------------------------------------------------------------------------ optimisation
def not_finite(history: History, t: Thresholds) -> Seen:
    """A loss, gradient norm or estimator number that is not finite now; the one that was first, loss before others."""
    first: tuple[int, str] | None = None
    for prefix in ("loss/", "grad_norm", "update_norm", "estimator/"):
        for name in history.names(prefix):
            since = history.since("not finite", name, lambda value: not math.isfinite(value))
            if since is not None and (first is None or since < first[0]):
                first = (since, name)
    return None if first is None else {"name": first[1], "since": first[0]}


def chance_loss(history: History, t: Thresholds) -> Seen:
    """|loss - chance| <= band for `steps` steps: an error after warm-up, a notice before. For every term of the
    objective that reports its chance level: 'loss/TERM/chance' beside 'loss/TERM/consistency' or 'loss/TERM/loss'."""
    notice: Seen = None
    for name in history.names("loss/"):
        term = name.removesuffix("/chance")
        chance = history.last(name)
        names = (f"{term}/consistency", f"{term}/loss", f"{term}/total")
        measured = next((n for n in names if history.finite(n)), None)
        if term == name or chance is None or measured is None:
            continue
        start = history.since("at chance", measured, _within(chance, t["band"]))
        if start is None or (lasted := history.series(measured)[-1].step - start) < t["steps"]:
            continue
        seen = {"name": measured, "loss": history.last(measured), "chance": chance, "steps": lasted}
        if start + lasted - max(start, history.warmup_steps) >= t["steps"]:
            return seen
        notice = {**seen, "severity": "notice"}
    return notice


def dead_term(history: History, t: Thresholds) -> Seen:
    """A weighted term whose gradient norm is exactly 0 in the last `records` records, over `steps` steps or more."""
    for term, points in _terms(history):
        tail = points[-int(t["records"]) :]
        since = history.since("zero", f"grad_norm/{term}", lambda value: value == 0.0)
        if since is None or len(tail) < t["records"] or any(p.value != 0.0 for p in tail):
            continue
        if tail[-1].step - since >= t["steps"]:
            return {"term": term, "since": since}
    return None


def inert_term(history: History, t: Thresholds) -> Seen:
    """A weighted term whose gradient norm is positive and below `share` of the total in the last `records` records."""
    count = int(t["records"])
    prompts = history.last("prompts/count") is not None
    share, notice = (t["prompts_share"], {"severity": "notice"}) if prompts else (t["share"], {})
    # All points: terms are probed at evaluations alone, the total is logged far more often.
    total = {p.step: p.value for p in history.finite("grad_norm")}
    for term, points in _terms(history):
        tail = [(p.step, p.value / total[p.step]) for p in points[-count:] if total.get(p.step, 0.0) > 0.0]
        if len(tail) == count and all(0.0 < ratio < share for _, ratio in tail):
            return {"term": term, "since": tail[0][0], "ratio": tail[-1][1], **notice}
    return None


def dead_parameter(history: History, t: Thresholds) -> Seen:
    """A named part of the parameters whose gradient norm 'gradient/NAME' is exactly 0 for `steps` steps up to now,
    while that of another part is not. In alignment runs a row of its own names what never had one."""
    names = history.names("gradient/")
    dead = []
    for name in names:
        first = history.series(name)[0]
        if history.finite("loss/above_chance") and first.step <= 1 and first.value == 0.0:
            continue
        since = history.since("no gradient", name, lambda value: value == 0.0)
        if since is not None and history.series(name)[-1].step - since >= t["steps"]:
            dead.append((name.removeprefix("gradient/"), since))
    if not dead or len(dead) == len(names):
        return None
    return {"names": ", ".join(name for name, _ in dead), "since": max(since for _, since in dead)}


def starving_input(history: History, t: Thresholds) -> Seen:
    """Share of the time spent waiting for data above `share` in each of the last `records` windows and over the last
    windows that together last `seconds`, where a step waits `wait` seconds or more.

    Window: from one training record to the next; `seconds` of a record is the training time so far.
    """
    lasted = waited = steps = 0.0
    count = 0
    newest: tuple[Point, Point] | None = None
    for wait, clock in zip(reversed(history.finite("input_wait")), reversed(history.finite("seconds")), strict=False):
        if wait.step != clock.step:
            return None
        if newest is not None:
            took = newest[1].value - clock.value
            if took <= 0.0 or (newest[0].value <= t["share"] and count < t["records"]):
                return None  # not starving, or another process that resumed the run
            lasted, waited, count = lasted + took, waited + newest[0].value * took, count + 1
            steps += newest[0].step - wait.step
            if count >= t["records"] and lasted >= t["seconds"]:
                enough = waited > t["share"] * lasted and waited >= t["wait"] * steps
                return {"share": waited / lasted, "wait": waited / steps, "seconds": lasted} if enough else None
        newest = wait, clock
    return None


# -------------------------------------------------------------------------------------------------- encoder
def encoder_collapse(history: History, t: Thresholds) -> Seen:
    """Effective rank below `share` of the attainable, and no higher than right after initialisation, `steps` steps or
    more later.

    An untrained encoder may well have a low rank; that it has not risen is what makes it a collapse."""
    points, attainable = history.finite("effective_rank"), history.last("rank/image/attainable")
    if attainable is None or _lasted(points) < t["steps"]:
        return None
    rank, initial = points[-1].value, points[0].value
    if rank >= t["share"] * attainable or rank > initial:
        return None
    return {"rank": rank, "attainable": attainable, "initial": initial}


def constant_side(history: History, t: Thresholds) -> Seen:
    """Spread, effective rank or mean cosine of unit features beyond its threshold, `steps` steps or more after
    initialisation (where a cosine of 0.999 is no fault yet)."""
    spread, rank, cosine = (history.finite(f"rank/image/{name}") for name in ("std", "effective", "mean_cosine"))
    if min(_lasted(points) for points in (spread, rank, cosine)) < t["steps"]:
        return None
    seen = {"std": spread[-1].value, "rank": rank[-1].value, "cosine": cosine[-1].value}
    constant = seen["std"] < t["std"] or seen["rank"] < t["rank"] or seen["cosine"] > t["cosine"]
    return seen if constant else None


def nothing_learned(history: History, t: Thresholds) -> Seen:
    """Mean cosine of features, coverage and nearest-prototype cosine all within `change` of their first values, at
    least `steps` steps later. All three: frozen prototypes keep the last one for ever and may still teach.

    Or the update of the parameters exactly 0 for `steps` steps up to now: batch norm alone may then move features."""
    since = history.since("still", "update_norm", lambda value: value == 0.0)
    if since is not None and (still := history.series("update_norm")[-1].step - since) >= t["steps"]:
        return {"what": f"no parameter has moved for {still} steps: every update is exactly 0"}
    names = ("rank/image/mean_cosine", "prototypes/coverage", "prototypes/nearest_cosine/0.5")
    series = [history.finite(name) for name in names]
    if min(_lasted(points) for points in series[:2]) < t["steps"]:
        return None
    for points in series:
        # Near 0 a relative change means nothing: 0.1 is the least scale that cosines are judged by.
        if points and abs(points[-1].value - points[0].value) > t["change"] * max(abs(points[0].value), 0.1):
            return None
    steps, cosine, coverage = series[0][-1].step - series[0][0].step, series[0][-1].value, series[1][-1].value
    what = f"after {steps} steps the features' mean cosine ({cosine:.4f}) and the coverage ({coverage:.4f}) are within "
    return {"what": f"{what}{t['change']:.0%} of their values at initialisation"}


# ----------------------------------------------------------------------------------------------- prototypes
def dead_prototypes(history: History, t: Thresholds) -> Seen:
    """Dead share above `share` and not getting better, `steps` steps or more after the first evaluation.

    Not better is either of: higher at each of the last `checks` evaluations than at the one before, by `rise` in all;
    or above `share` at each of the last `checks`, the first evaluation not among them, and lower by less than `rise`
    over them. A share that is high and falls is a run that wakes its prototypes up.

    The share is of the prototypes that as many images as there are would reach if they chose at random,
    K (1 - exp(-M / K)): a few images cannot use many prototypes, and that is no fault of these.
    """
    live, count = history.finite("prototypes/live"), history.last("prototypes/count")
    checks = int(t["checks"])
    if len(live) < checks or not count or _lasted(live) < t["steps"]:
        return None
    rows = history.last("prototypes/rows") or count
    usable = count * (1.0 - math.exp(-rows / count))
    dead = [1.0 - min(p.value / usable, 1.0) for p in live]
    tail = dead[-checks:]
    rising = all(b > a for a, b in itertools.pairwise(tail)) and tail[-1] - tail[0] >= t["rise"]
    staying = len(dead) > checks and min(tail) > t["share"] and tail[0] - tail[-1] < t["rise"]
    if tail[-1] <= t["share"] or not (rising or staying):
        return None
    return {"dead": dead[-1], "count": usable, "rows": rows, "least": min(dead[:-1])}


def duplicate_prototypes(history: History, t: Thresholds) -> Seen:
    """More than `copies` live prototypes repeat another at epsilon 0.025, and the unique share is below `share` at the
    last two checks, or lower than before at each of the last `checks` checks, by `fall` in all, and at the last one by
    `levels` times the mean of these falls; `steps` steps or more after the first evaluation, which shows the start."""
    live = {p.step: p.value for p in history.finite("prototypes/live")}
    unique = history.finite("prototypes/live_unique/0.025")
    shares = [p.value / live[p.step] for p in unique if live.get(p.step, 0.0) > 0.0]
    if not shares or unique[-1].step not in live or live[unique[-1].step] <= 0.0 or _lasted(unique) < t["steps"]:
        return None
    if live[unique[-1].step] - unique[-1].value <= t["copies"]:
        return None
    tail = shares[-int(t["checks"]) - 1 :]
    falls = [a - b for a, b in itertools.pairwise(tail)]
    falling = len(falls) == t["checks"] and min(falls) > 0 and sum(falls) >= t["fall"]
    low = len(shares) > 1 and max(shares[-2:]) < t["share"]
    if not low and not (falling and falls[-1] >= t["levels"] * sum(falls) / len(falls)):
        return None
    before = shares[0] if len(shares) > 1 else shares[-1]
    return {"unique": unique[-1].value, "live": live[unique[-1].step], "share": shares[-1], "before": before}


def variance_floor(history: History, t: Thresholds) -> Seen:
    """Share of variances at the floor above `share`."""
    share = history.last("estimator/floor_share")
    return {"share": share} if share is not None and share > t["share"] else None


def statistics_underflow(history: History, t: Thresholds) -> Seen:
    """Share of components whose mass is below float32's smallest normal number above `share`."""
    share = history.last("estimator/underflow_share")
    return {"share": share} if share is not None and share > t["share"] else None


def one_hot(history: History, t: Thresholds) -> Seen:
    """Mean largest responsibility above `largest` in every record after the first step (one batch against the start),
    at least `records` of them, while the perplexity of usage is below `perplexity` of K.

    Both entropies, always: decided rows over evenly used prototypes are what a balanced, sharp E-step gives."""
    points = [p for p in history.finite("estimator/max_responsibility") if p.step > 1]
    usage, count = history.last("estimator/usage_perplexity"), history.last("prototypes/count")
    if len(points) < t["records"] or usage is None or not count or usage >= t["perplexity"] * count:
        return None
    if any(p.value <= t["largest"] for p in points):
        return None
    return {"largest": points[-1].value, "first": points[0].step, "perplexity": usage, "count": count}


# --------------------------------------------------------------------------------------------------- helpers
def _lasted(points: list[Point]) -> int:
    """Steps from the first point to the last; -1 without two points."""
    return points[-1].step - points[0].step if len(points) > 1 else -1


def _within(level: float, band: float) -> Callable[[float], bool]:
    return lambda value: abs(value - level) <= band


def _terms(history: History) -> list[tuple[str, list[Point]]]:
    """(term, its gradient norms) for 'grad_norm/TERM' of terms whose 'weight/TERM' is not 0 (or not recorded)."""
    names = (name.removeprefix("grad_norm/") for name in history.names("grad_norm/"))
    return [(name, history.finite(f"grad_norm/{name}")) for name in names if history.last(f"weight/{name}") != 0.0]
