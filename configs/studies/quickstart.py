"""The quickstart's arms over three seeds: docs/results/quickstart.md.

protojax study quickstart --out docs/results/quickstart.md
"""

from protojax.study import Row, Study, Trial

ARMS = ("decoupled", "joint", "frozen")


def ratio(summary):
    """k-NN of the trained over that of the untrained encoder."""
    return summary["knn"]["fine"]["20"] / summary["controls"]["untrained_knn"]["fine"]["20"]


def get_study(smoke: bool = False) -> Study:
    if smoke:
        trials = tuple(Trial(arm, f"quickstart:{arm},smoke") for arm in ARMS[:2])
    else:
        trials = tuple(Trial(arm, f"quickstart:{arm}") for arm in ARMS)
    k = "5" if smoke else "20"
    return Study(
        name="quickstart",
        question="Does the encoder learn, and what becomes of the prototypes? Embedded Grocery Store photographs, "
        "2,936 for training, 2,485 for testing, 81 fine and 43 coarse classes; last checkpoint, k-NN with k = 20, "
        "T = 0.07, the training set as bank; groups are terciles of the training counts.",
        trials=trials,
        seeds=(0, 1) if smoke else (0, 1, 2),
        rows=(
            Row("k-NN fine, %", f"knn/fine/{k}", 100),
            Row("k-NN fine, untrained, %", f"controls/untrained_knn/fine/{k}", 100),
            *(() if smoke else (Row("k-NN fine, ratio to untrained", ratio, digits=2),)),
            *(() if smoke else (Row("k-NN coarse, %", f"knn/coarse/{k}", 100),)),
            Row("k-NN head, %", "groups/fine/head", 100),
            Row("k-NN medium, %", "groups/fine/medium", 100),
            Row("k-NN tail, %", "groups/fine/tail", 100),
            Row("unique at 0.5, start", "controls/initial_unique/0.5", digits=0),
            Row("unique at 0.5, end", "prototypes/unique/0.5", digits=0),
            Row("unique at 0.25, end", "prototypes/unique/0.25", digits=0),
            Row("unique at 0.1, end", "prototypes/unique/0.1", digits=0),
            Row("unique at 0.025, end", "prototypes/unique/0.025", digits=0),
            Row("unique at 0.5, random directions", "controls/random_unique/0.5", digits=0),
            Row("live, end", "prototypes/live", digits=0),
            Row("live-unique at 0.025, end", "prototypes/live_unique/0.025", digits=0),
            Row("live-unique at 0.5, end", "prototypes/live_unique/0.5", digits=0),
            Row("usage perplexity, end", "prototypes/perplexity", digits=0),
            Row("coverage, end", "prototypes/coverage", digits=2),
            Row("effective rank, end", "effective_rank"),
        ),
        reference="decoupled",
        compared=("k-NN fine, %", "k-NN tail, %"),
        curves={
            "k-NN fine": f"knn/fine/{k}",
            "unique at 0.5": "prototypes/unique/0.5",
            "live-unique at 0.025": "prototypes/live_unique/0.025",
        },
    )
