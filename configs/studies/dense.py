"""Dense prediction under decoupling: masked patches (iBOT) beside the image-level loss, joint and decoupled.

    protojax study dense --out docs/results/dense_grocery.md
    protojax study dense:omniglot --data=DIR --out docs/results/dense_omniglot.md       # and fashion, tiny_mini
    protojax study dense:tiny,vit_ti --data=DIR                                          # on a GPU

An open question of Arteaga et al. Without DATA's own network: vit_micro, patches of 8 px.
"""

from protojax import evidence
from protojax.measuring import Evaluated
from protojax.study import Row, Study

ARMS = {
    f"{arm}{' + patches' if patches else ''}": f"{arm},ibot" if patches else arm
    for arm in ("decoupled", "joint", "frozen")
    for patches in (False, True)
}


def get_study(smoke: bool = False, argument: str = "grocery") -> Study:
    of = evidence.asked(argument if "vit_" in argument else f"{argument},vit_micro", smoke)
    probe = {"linear": {"steps": 5} if smoke else {}}
    trials = tuple(of.trial(label, arm) for label, arm in ARMS.items())
    return Study(
        name=f"dense_{argument.replace(',', '_')}",
        question=f"{of.about}. 'patches': the masked-patch loss with weight 1 beside the arm's own, 40% of the patches "
        "hidden in blocks, one codebook for both.",
        trials=trials[1:2] if smoke else trials,
        rows=(
            *evidence.k_nn(of.nearest),
            Row("linear, %", "measured/probe/linear/fine/accuracy", 100),
            *evidence.ALIVE,
            *evidence.USE,
        ),
        seeds=of.seeds,
        reference=None if smoke else "decoupled + patches",
        compared=("k-NN, %", "live-unique at 0.025, % of K"),
        measures=(Evaluated("probe", {"evaluations": probe, "labels": ["fine"]}),),
        runs=of.runs,
        tall=True,
    )
