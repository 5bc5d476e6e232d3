"""Are the prototypes distinct, and do they work? All arms and rival estimators on one data set.

    protojax study diversity --out docs/results/diversity_grocery.md
    protojax study diversity:omniglot --data=DIR --out docs/results/diversity_omniglot.md      # and fashion, tiny_mini
    protojax study diversity:tiny,resnet18 --data=DIR --only=decoupled,joint,frozen            # on a GPU

DIR holds the archives that configs/prototypes.py names. After Table 1 and Figure 3a of Arteaga et al., with the
controls that these lack.
"""

from protojax import evidence
from protojax.evals.audit import EPSILONS
from protojax.measuring import Evaluated
from protojax.study import Row, Study

ARMS = (
    *("decoupled", "joint", "joint_koleo", "partial", "frozen", "paper", "mixture", "spherical_kmeans"),
    *("von_mises_fisher", "variational", "periodic_kmeans", "coupled", "decoupled_swav", "joint_swav"),
    *("decoupled_dino", "joint_dino"),
)


def get_study(smoke: bool = False, argument: str = "grocery") -> Study:
    of = evidence.asked(argument, smoke)
    control = Evaluated("attainable", {"evaluations": {"attainable": {}}})
    best = "measured/attainable/attainable/kmeans/live_unique"
    return Study(
        name=f"diversity_{argument.replace(',', '_')}",
        question=f"{of.about}. Last checkpoint, seeds {', '.join(map(str, of.seeds))}. Live: nearest to more than "
        "1 / (10 K) of all training images. k-means: as many centres on the same features, what these let a codebook "
        "tell apart.",
        trials=of.arms(ARMS),
        rows=(
            *evidence.ALIVE,
            *(Row(f"k-means live-unique at {e:g}, % of K", evidence.share(f"{best}/{e:g}"), 100) for e in EPSILONS),
            *evidence.UNIQUE,
            *evidence.START,
            *evidence.USE,
            *evidence.k_nn(of.nearest),
        ),
        seeds=of.seeds,
        reference="decoupled",
        compared=("live-unique at 0.025, % of K", "k-NN, %"),
        curves=evidence.CURVES,
        measures=(control,),
        runs=of.runs,
        tall=True,
    )
