"""Where many prototypes should matter most: head, medium and tail of long-tailed data.

    protojax study long_tail --data=DIR --out docs/results/long_tail_lt100_if100.md       # 100 classes, imbalance 100
    protojax study long_tail:lt200_if10 --data=DIR --out docs/results/long_tail_lt200_if10.md
    protojax study long_tail:omniglot --data=DIR --out docs/results/long_tail_omniglot.md       # made long-tailed
    protojax study long_tail:grocery --out docs/results/long_tail_grocery.md                    # mildly so by itself
    protojax study long_tail:lt100_if100,resnet18 --data=DIR                                    # on a GPU

LIST of Tiny ImageNet: lt100_if10, lt100_if50, lt100_if100, lt200_if10, lt200_if50, lt200_if100. Published on
iNaturalist 2018: +5.7 points in the tail, decoupled against joint.

Whoever learns from the long-tailed set itself hardly ever answers with a class of its tail, whatever the features are.
So the features are also asked with *all* images of the classes to learn from ("full-shot"), head, medium and tail
still by what the encoder was trained on: do rare classes have worse features?
"""

from protojax import evidence
from protojax.measuring import Evaluated
from protojax.study import Row, Study, Trial

LISTS = tuple(f"lt{classes}_if{factor}" for classes in (100, 200) for factor in (10, 50, 100))
ARMS = ("decoupled", "joint", "joint_koleo", "partial", "frozen", "paper")
# A prior other than uniform, in the decoupled arm: docs/prototypes.md says why.
PRIORS = {
    "power-law prior 0.5": {"method.estimator.prior_exponent": 0.5},
    "power-law prior 1": {"method.estimator.prior_exponent": 1.0},
    "estimated prior": {"method.estimator.prior": "estimated"},
}
# Fifteen drawings of the most frequent character, one of the rarest; the test split stays balanced.
OMNIGLOT = {"data.longtail.factor": 15.0}


def _trials(argument: str, smoke: bool) -> tuple[str, str, str, tuple[Trial, ...], str | None]:
    """(folder of runs, about the data, rule for the groups, trials, config of the data before they were cut)."""
    name = argument.split(",")[0]
    if name not in LISTS:
        of = evidence.asked(argument, smoke)
        cut = of.data == "omniglot"
        changes = OMNIGLOT if cut else {}
        trials = [of.trial(arm, arm, changes) for arm in ARMS]
        trials += [of.trial(label, changes={**changes, **prior}) for label, prior in PRIORS.items()]
        tailed = "; made long-tailed, imbalance 15" if cut else ""
        whole = of.trial("").config if cut else None
        return of.runs + ("_lt" if cut else ""), of.about + tailed, "terciles", tuple(trials), whole
    network = "micro" if argument == name else argument.removeprefix(f"{name},")
    if network not in ("micro", "resnet18"):
        raise ValueError(f"long_tail: expected micro or resnet18 behind {name!r}, got {network!r}.")
    flag = "smoke" if smoke else network if network == "micro" else ""
    subset = evidence.SMALLEST if smoke else {"data.root": "tinyimagenet200_32_jpeg.npz", "data.source.subset": name}
    config = lambda arm: "tinyimagenet_lt:" + ",".join(filter(None, (arm, flag)))  # noqa: E731
    trials = [Trial(arm, config(arm), subset) for arm in ARMS]
    trials += [Trial(label, config("decoupled"), {**subset, **prior}) for label, prior in PRIORS.items()]
    about = f"Tiny ImageNet at 32 px, list {name}, K = 2,048; {network}"
    whole = config("decoupled") if smoke else "prototypes:tiny"
    return argument.replace(",", "_"), about, "inat", tuple(trials), whole


def get_study(smoke: bool = False, argument: str = "lt100_if100") -> Study:
    runs, about, rule, trials, whole = _trials(argument, smoke)
    probe = {"linear": {"steps": 5} if smoke else {}}
    measures = [Evaluated("linear", {"evaluations": probe, "labels": ["fine"], "groups": rule})]
    groups = ("head", "medium", "tail")
    nearest = "5" if smoke else str(evidence.K_NEAREST)
    full: list[Row] = []
    if whole is not None:
        evaluations, k = {"knn": {}, **probe}, [int(nearest)]
        asked = {"evaluations": evaluations, "labels": ["fine"], "groups": f"training:{rule}", "k": k}
        measures.append(Evaluated("full", asked, bank=whole))
        full = [Row(f"full-shot k-NN {g}, %", f"measured/full/groups/fine/{g}", 100) for g in groups]
        full += [Row(f"full-shot linear {g}, %", f"measured/full/linear/fine/groups/{g}", 100) for g in groups]
    return Study(
        name=f"long_tail_{argument.replace(',', '_')}",
        question=f"{about}. Last checkpoint; groups by training counts: more than 100, 20 to 100, fewer than 20 images "
        "(thirds of the classes where none has more than 100). k = 20, the long-tailed training set as bank; "
        "full-shot: all images of these classes to learn from, the encoder as it is.",
        trials=trials[:1] if smoke else trials,
        rows=(
            *evidence.TAIL,
            Row("k-NN all, %", f"knn/fine/{nearest}", 100),
            Row("k-NN, mean over classes, %", "groups_macro/fine/all", 100),
            *(Row(f"linear {g}, %", f"measured/linear/linear/fine/groups/{g}", 100) for g in groups),
            Row("linear all, %", "measured/linear/linear/fine/accuracy", 100),
            *full,
            *evidence.ALIVE[:2],
            Row("usage perplexity, % of K", evidence.share("prototypes/perplexity"), 100),
        ),
        seeds=evidence.SEEDS[: 1 if smoke else None],
        reference="decoupled",
        compared=(
            *("k-NN tail, %", "k-NN all, %", "k-NN, mean over classes, %", "linear tail, %"),
            *(row.title for row in full if "tail" in row.title),
        ),
        measures=tuple(measures),
        runs=runs,
        tall=True,
    )
