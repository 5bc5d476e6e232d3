"""What do the encoders know? k-NN and linear probe at home, and the same on data that they were not trained on.

    protojax study representation --data=DIR --out docs/results/representation_grocery.md
    protojax study representation:omniglot --data=DIR --out docs/results/representation_omniglot.md    # and fashion

The runs are those of `diversity`: what is there is not trained again. Transfer: the encoder stays as it is, the other
data set's training images are the bank of the k-NN and what the probe learns from.
"""

from typing import Any

from protojax import evidence
from protojax.measuring import Evaluated
from protojax.study import Row, Study

ARMS = ("decoupled", "joint", "frozen", "joint_koleo", "partial", "paper", "decoupled_dino", "joint_dino")
AWAY = ("grocery", "omniglot", "fashion", "tiny_mini")
PROBES: dict[str, Any] = {"evaluations": {"knn": {}, "linear": {}}, "k": [evidence.K_NEAREST], "labels": ["fine"]}
SHORT: dict[str, Any] = {"evaluations": {"knn": {}, "linear": {"steps": 5}}, "k": [5], "labels": ["fine"]}


def get_study(smoke: bool = False, argument: str = "grocery") -> Study:
    of = evidence.asked(argument, smoke)
    away = [name for name in AWAY if name != of.data][: 1 if smoke else None]
    plain = SHORT if smoke else PROBES
    places = {name: f"prototypes:{'smoke' if smoke else name}" for name in away}
    home = Evaluated("home", {**plain, "evaluations": {**plain["evaluations"], "clustering": {}}})
    measures = (home, *(Evaluated(f"on_{n}", plain, data) for n, data in places.items()))
    rows = [*evidence.k_nn(of.nearest), Row("linear, %", "measured/home/linear/fine/accuracy", 100)]
    # What the loss draws together: images that share a prototype.
    shared = "measured/home/clustering/fine/pair_precision"
    rows.append(Row("pairs that share a prototype and the class, %", shared, 100))
    for name in away:
        rows += [
            Row(f"{name}: k-NN, %", f"measured/on_{name}/knn/fine/{of.nearest}", 100),
            Row(f"{name}: linear, %", f"measured/on_{name}/linear/fine/accuracy", 100),
        ]
    return Study(
        name=f"representation_{argument.replace(',', '_')}",
        question=f"Trained on: {of.about}. Last checkpoint, teacher's backbone features. Softmax probe: rate and decay "
        "chosen on a held-out tenth of the training images. Pairs: of all pairs of training images that share their "
        "nearest prototype, how many are of one class. Below a name: the same encoders on that data set.",
        trials=of.arms(ARMS),
        rows=tuple(rows),
        seeds=of.seeds,
        reference="decoupled",
        compared=tuple(row.title for row in rows if "untrained" not in row.title),
        measures=measures,
        runs=of.runs,
        tall=True,
    )
