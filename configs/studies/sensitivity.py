"""How much does a number matter? eta, beta's schedule, temperature, rate, KoLeo, K, D, batch size, one at a time.

    protojax study sensitivity --out docs/results/sensitivity_grocery.md
    protojax study sensitivity:omniglot --data=DIR --out docs/results/sensitivity_omniglot.md    # and fashion

eta and beta are those of the paper's mixture, which the paper does not give. The lines 'decoupled', 'joint' and 'paper'
have the default of everything. At another batch size as many images are
seen, by the two rules of `arms.at_batch`.
"""

from protojax import evidence
from protojax.study import Row, Study, Trial

ETAS = (0.001, 0.003, 0.01, 0.1, 0.3)
BETAS = {
    "1": 1.0,
    "0.1 to 1 in 0.1": ("linear", 0.1, 1.0, 0.0, 0.1),
    "0.1 to 1 in 0.3": ("linear", 0.1, 1.0, 0.0, 0.3),
    "0.5 to 1 in 1": ("linear", 0.5, 1.0, 0.0, 1.0),
}
TEMPERATURES = (0.003, 0.01, 0.02, 0.03, 0.05)
RATES = (0.05, 0.1, 0.5)
SPREADS = (0.1, 0.2, 1.0)  # weights of KoLeo on the features
FACTORS = (0.25, 0.5, 2, 4)  # of K
WIDTHS = (16, 32, 128, 256)
BATCHES = (32, 64, 256)


def _trials(of: evidence.Asked) -> list[Trial]:
    count = of.config.method.estimator.components
    out = [of.trial(arm, arm) for arm in ("decoupled", "joint", "paper")]
    out += [of.trial(f"eta {v:g}", "paper", {"method.estimator.eta": v}) for v in ETAS]
    out += [of.trial(f"beta {name}", "paper", {"method.estimator.beta": v}) for name, v in BETAS.items()]
    out += [of.trial(f"temperature {v:g}", changes={"method.estimator.temperature": v}) for v in TEMPERATURES]
    out += [of.trial(f"rate {v:g}", changes={"method.estimator.rate": v}) for v in RATES]
    out += [of.trial(f"KoLeo {w:g}", changes={"method.objective.koleo.weight": w}) for w in SPREADS]
    for arm in ("decoupled", "joint"):
        sizes = [round(count * f) for f in FACTORS]
        out += [of.trial(f"{arm} K {k}", arm, {"method.estimator.components": k}) for k in sizes]
        out += [of.trial(f"{arm} D {d}", arm, {"method.head.dim": d}) for d in WIDTHS]
        out += [of.at_batch(f"{arm} batch {b}", arm, b) for b in BATCHES]
    return out


def get_study(smoke: bool = False, argument: str = "grocery") -> Study:
    of = evidence.asked(argument, smoke)
    return Study(
        name=f"sensitivity_{argument.replace(',', '_')}",
        question=f"{of.about}. One number changed a line; defaults: eta 0.05, beta from 0.5 to 1 in 0.3 of the run, "
        "temperature 0.005, rate 0.2, KoLeo 0.5, D = 64, batch 128.",
        trials=(of.trial("K 32", changes={"method.estimator.components": 32}),) if smoke else tuple(_trials(of)),
        rows=(
            Row("prototypes", "prototypes/count", digits=0),
            *evidence.ALIVE,
            *evidence.USE,
            *evidence.k_nn(of.nearest)[:1],
            Row("images/s", "images_per_second", digits=0),
        ),
        seeds=of.seeds,
        runs=of.runs,
        tall=True,
    )
