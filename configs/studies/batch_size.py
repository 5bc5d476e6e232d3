"""Does it work with small batches? Batch 32 against 256, as many images seen.

    protojax study batch_size --out docs/results/batch_size_grocery.md
    protojax study batch_size:omniglot --data=DIR --out docs/results/batch_size_omniglot.md      # and fashion

Learning rate and teacher momentum follow the batch by the two rules of `arms.at_batch`; the estimator is the same.
Asked: batch 32 within two points of 256 in k-NN for the decoupled arm.
"""

from protojax import evidence
from protojax.study import Row, Study

ARMS = ("decoupled", "joint", "frozen")
SIZES = (256, 32)


def get_study(smoke: bool = False, argument: str = "grocery") -> Study:
    of = evidence.asked(argument, smoke)
    arms, sizes = (ARMS[:1], (8,)) if smoke else (ARMS, SIZES)
    return Study(
        name=f"batch_size_{argument.replace(',', '_')}",
        question=f"{of.about}. The same number of images seen at every batch size; difference: decoupled at batch 256 "
        "to each of the others.",
        trials=tuple(of.at_batch(f"{arm} batch {size}", arm, size) for arm in arms for size in sizes),
        rows=(
            *evidence.k_nn(of.nearest),
            *evidence.ALIVE,
            *evidence.USE,
            Row("images/s", "images_per_second", digits=0),
        ),
        seeds=of.seeds,
        reference=f"decoupled batch {sizes[0]}",
        compared=("k-NN, %", "live-unique at 0.025, % of K"),
        runs=of.runs,
        tall=True,
    )
