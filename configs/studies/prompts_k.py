"""How many sub-prompts? K from 1 to 64, chosen on validation top-1.

    protojax study prompts_k --out docs/results/prompts_k.md

For your own cache: the same trials with config "prompts_cars" and changes {"data.root": ...} in a copy of this file.
"""

from protojax.study import Row, Study, Trial

COUNTS = (1, 2, 4, 8, 16, 32, 64)


def get_study(smoke: bool = False) -> Study:
    argument = "prompts_synthetic:default,smoke" if smoke else "prompts_synthetic:default,hard"
    trials = tuple(
        Trial(f"K = {k}", argument, {"method.prompts.num_prompts": k}) for k in (COUNTS[:2] if smoke else COUNTS)
    )
    return Study(
        name="prompts_k",
        question="Preset hard: 40 classes of 4 modes, 64 training images each, half of the classes in pairs that one "
        "prompt cannot part. K is chosen by the first row; the second is what is published.",
        trials=trials,
        seeds=(0,) if smoke else (0, 1, 2),
        rows=(
            Row("validation top-1, %", "prompts/validation/top1", 100),
            Row("test top-1, %", "prompts/accuracy/top1", 100),
            Row("balanced accuracy, %", "prompts/accuracy/balanced", 100),
            Row("ECE", "prompts/accuracy/ece", digits=3),
            Row("used sub-prompts", "prompts/e_step/usage_perplexity"),
            Row("effective sub-prompts", "prompts/e_step/effective"),
            Row("mode purity", "prompts/e_step/purity", digits=2),
            Row("zero-shot, %", "prompts/baselines/zero_shot/top1", 100),
            Row("linear probe, %", "prompts/baselines/linear_probe/top1", 100),
            Row("k-means of K centres, %", "prompts/baselines/k_means/top1", 100),
        ),
        reference="K = 1",
        compared=("test top-1, %",),
    )
