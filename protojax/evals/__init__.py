"""Evaluations: pure functions of feature banks and codebooks, the same in training and on a checkpoint.

Numpy arrays in, plain numbers out. `neighbours` finds nearest rows exactly, `knn`, `linear`, `rank`, `clustering` and
`audit` measure, `evaluations` wraps them as :class:`protojax.api.Evaluation`, `detectors` says what goes wrong.
"""
