"""Evaluations: pure functions of feature banks and codebooks, the same in training and on a checkpoint.

Numpy arrays in, plain numbers out. `neighbours` finds nearest rows exactly; `knn`, `linear`, `few_shot`, `retrieval`,
`clustering`, `kmeans`, `calibration`, `rank`, `geometry`, `transfer` and `audit` measure; `evaluations` and `labelled`
wrap them as :class:`protojax.api.Evaluation`, `table` names them; `detectors` says what goes wrong.
"""
