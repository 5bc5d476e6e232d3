"""What does the estimator cost? Time and memory, as shares of the training step.

    protojax study overhead --out docs/results/overhead_grocery.md               # on the machine that is asked about
    protojax study overhead:tiny,resnet18 --data=DIR --out docs/results/overhead_tiny_resnet18.md

Nothing is learned: a run trains 16 steps, then the whole step and the same step without the estimator's statistics and
update take turns in one process (`protojax/overhead.py`). Run it while the machine does nothing else.
"""

from protojax import evidence
from protojax.measuring import Overhead
from protojax.study import Row, Study

ARMS = (
    *("decoupled", "joint", "partial", "frozen", "paper", "mixture", "spherical_kmeans", "von_mises_fisher"),
    *("variational", "periodic_kmeans", "coupled", "joint_swav"),
)
COUNTS = (512, 2048, 8192)
SHORT = {"method.steps": 16, "evals.evaluations": ("rank",), "evals.every": 1.0, "run.report": False}


def get_study(smoke: bool = False, argument: str = "grocery") -> Study:
    of = evidence.asked(argument, smoke)
    short = {**SHORT, "method.steps": 2} if smoke else SHORT
    trials = [of.trial(arm, arm, short) for arm in ARMS]
    for arm in ("decoupled", "paper", "joint"):
        for k in COUNTS:
            trials.append(of.trial(f"{arm} K {k}", arm, {**short, "method.estimator.components": k}))
        trials.append(of.trial(f"{arm} batch 32", arm, {**short, "data.batch_size": 32}))
    at = "measured/overhead/"
    return Study(
        name=f"overhead_{argument.replace(',', '_')}",
        question=f"{of.about}. Share: of the time of the whole step that the estimator's statistics and update take; "
        "noise: the difference of two timings of the same step. Joint prototypes cost in the gradient and the "
        "optimiser, which is in the step. Memory: the estimator's state, and temporaries of the compiled step.",
        trials=tuple(trials[: 1 if smoke else None]),
        rows=(
            Row("step, ms", at + "step_ms"),
            Row("share of the step, %", at + "share", 100),
            Row("noise, %", at + "noise", 100),
            Row("images/s", at + "images_per_second", digits=0),
            Row("estimator's state, MB", at + "state_mb", digits=2),
            Row("share of the state, %", at + "state_share", 100),
            Row("temporaries, MB", at + "temporaries_mb"),
            Row("temporaries without it, MB", at + "without_temporaries_mb"),
        ),
        seeds=(0,),
        reference="decoupled",
        measures=(Overhead(rounds=1 if smoke else 5),),
        tall=True,
    )
