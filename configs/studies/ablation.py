"""What does each switch do? The decoupled default with one thing changed a line, then the paper's own mixture.

    protojax study ablation --out docs/results/ablation_grocery.md
    protojax study ablation:omniglot --data=DIR --out docs/results/ablation_omniglot.md     # and fashion, tiny_mini

The reason for each switch stands in docs/prototypes.md and in the docstrings of `estimators.balanced` and
`estimators.mixture`. The second part is after Table A.1 of Arteaga et al.: annealing and forgetting on and off.
"""

from protojax import evidence
from protojax.study import Row, Study


def changes(count: int) -> dict[str, tuple[str, dict]]:
    """Label -> (arm, what is changed); `count` prototypes. Keys are those of `method.estimator` unless they say so."""
    balanced = {
        "annealed from 0.2": {"temperature": ("exponential", 0.2, 0.005, 0.0, 0.1)},
        "annealed from 0.05": {"temperature": ("exponential", 0.05, 0.005, 0.0, 0.1)},
        "blunt (0.05)": {"temperature": 0.05},
        "no centring": {"center": False},
        "started at random": {"start": "random", "start_sweeps": 0},
        "no start sweeps": {"start_sweeps": 0},
        "memory 2 K": {"memory": 2 * count},
        "memory 8 K": {"memory": 8 * count},
        "rate 0.05": {"rate": 0.05},
        "rate 1": {"rate": 1.0},
        "1 Sinkhorn iteration": {"iterations": 1},
        "10 Sinkhorn iterations": {"iterations": 10},
        "swept at every step": {"every": 1},
        "swept every 8 steps": {"every": 8},
        "power-law prior 0.5": {"prior_exponent": 0.5},
        "estimated prior": {"prior": "estimated"},
        "split and merge": {"split_merge": 8},
        "adaptive K": {"adapt": 8, "memory": 8 * count},
    }
    paper = {
        "paper": {},
        "paper without annealing": {"beta": 1.0},
        "paper with uniform forgetting": {"forgetting": "uniform"},
        "paper with neither": {"beta": 1.0, "forgetting": "uniform"},
        "paper from data": {"start": "kmeans++"},
        "paper from data centred": {"start": "kmeans++", "center": True},
        "the same with price": {"start": "kmeans++", "center": True, "price": 1.0},
        "the same with revival": {"start": "kmeans++", "center": True, "revive": 8},
        "the same with both": {"start": "kmeans++", "center": True, "price": 1.0, "revive": 8},
        "the same with equal weights": {"start": "kmeans++", "center": True, "weights": "uniform"},
        "paper with tied covariance": {"covariance": "tied"},
        "paper with spherical covariance": {"covariance": "spherical"},
        "paper with posterior assignment": {"covariance": "tied", "assignment": "posterior"},
    }
    full = lambda given: {f"method.estimator.{k}": v for k, v in given.items()}  # noqa: E731
    trials = {label: ("decoupled", full(given)) for label, given in balanced.items()}
    trials["no whitening"] = ("decoupled", {"method.head.whiten": 0})
    trials["no KoLeo"] = ("decoupled", {"method.objective.koleo.weight": 0.0})
    trials["fitted to the views"] = ("decoupled", {"method.rows": "views"})
    return trials | {label: ("paper", full(given)) for label, given in paper.items()}


def get_study(smoke: bool = False, argument: str = "grocery") -> Study:
    of = evidence.asked(argument, smoke)
    listed = changes(of.config.method.estimator.components)
    trials = [of.trial("decoupled"), *(of.trial(label, arm, changed) for label, (arm, changed) in listed.items())]
    return Study(
        name=f"ablation_{argument.replace(',', '_')}",
        question=f"{of.about}. 'decoupled' is the default; every other line says what is changed in it, lines that "
        "begin with 'paper' what is changed in the paper's mixture, 'the same' in that from data and centred. "
        "'adaptive K' says how many prototypes it keeps.",
        trials=tuple(t for t in trials if not smoke or t.label == "adaptive K"),
        rows=(
            Row("prototypes", "prototypes/count", digits=0),
            *evidence.ALIVE,
            *evidence.UNIQUE[:1],
            *evidence.USE,
            *evidence.k_nn(of.nearest)[:1],
            *evidence.TAIL[2:],
        ),
        seeds=of.seeds,
        reference=None if smoke else "decoupled",
        compared=("live-unique at 0.025, % of K", "k-NN, %"),
        runs=of.runs,
        tall=True,
    )
