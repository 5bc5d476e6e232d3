"""Few shots and unseen classes, as papers on prompt learning measure them.

    protojax study prompts_few_shot --out docs/results/prompts_few_shot.md

1, 2, 4, 8 and 16 training images a class, all test images; epochs as CoOp has them (50 for one shot, 100 for 2 and 4,
200 for 8 and 16); K = min(8, shots). Base-to-new: 16 shots of the first half of the classes; each half is tested by
itself, and the harmonic mean of the two accuracies is reported. For your own cache write a copy with config
"prompts_cars" and changes {"data.root": ...}.
"""

from protojax.study import Row, Study, Trial

SHOTS = {1: 50.0, 2: 100.0, 4: 100.0, 8: 200.0, 16: 200.0}
ARMS = {"mixture": "default", "published recipe": "original", "K = 1": "single_prompt"}


def trial(title: str, arm: str, shots: int, epochs: float, smoke: bool, **changes: float) -> Trial:
    count = {} if arm == "single_prompt" else {"method.prompts.num_prompts": min(8, shots)}
    preset = {} if smoke else {"method.epochs": epochs}
    argument = f"prompts_synthetic:{arm},{'smoke' if smoke else 'hard'}"
    return Trial(title, argument, {"data.source.shots": shots, **count, **preset, **changes})


def get_study(smoke: bool = False) -> Study:
    shots, arms = ({2: 1.0}, {"mixture": "default"}) if smoke else (SHOTS, ARMS)
    few = [trial(f"{title}, {n} shots", arm, n, epochs, smoke)
           for n, epochs in shots.items() for title, arm in arms.items()]  # fmt: skip
    most = max(shots)
    new = [trial(f"{title}, base-to-new", arm, most, shots[most], smoke, **{"data.source.unseen": 0.5})
           for title, arm in arms.items()]  # fmt: skip
    return Study(
        name="prompts_few_shot",
        question="Preset hard: 40 classes of 4 modes. What do a few images a class give, and what becomes of classes "
        "that training never saw? Their prompts are their text shifted by the mean offset of the others.",
        trials=(*few, *new),
        seeds=(0,) if smoke else (0, 1, 2),
        rows=(
            Row("top-1, %", "prompts/accuracy/top1", 100),
            Row("balanced accuracy, %", "prompts/accuracy/balanced", 100),
            Row("zero-shot, %", "prompts/baselines/zero_shot/top1", 100),
            Row("linear probe, %", "prompts/baselines/linear_probe/top1", 100),
            Row("nearest class mean, %", "prompts/baselines/class_mean/top1", 100),
            Row("used sub-prompts", "prompts/e_step/usage_perplexity"),
            Row("base classes, %", "prompts/base_to_new/base", 100),
            Row("new classes, %", "prompts/base_to_new/new", 100),
            Row("new classes, zero-shot, %", "prompts/base_to_new/new_zero_shot", 100),
            Row("harmonic mean, %", "prompts/base_to_new/harmonic_mean", 100),
        ),
    )
