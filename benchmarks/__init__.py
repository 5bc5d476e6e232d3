"""Measurements, one command each: ours and its peers take turns in one process.

A contender whose idle threads keep spinning burns a core in the next one's turn: OpenBLAS (scikit-learn) waits that
way for tens of milliseconds, which made ours look 1.7 times slower beside it than alone. So idle threads sleep,
everybody's; the peers' own times do not change by it. Set before NumPy is imported.
"""

import os

for _name, _value in {
    "OPENBLAS_THREAD_TIMEOUT": "4",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}.items():
    os.environ.setdefault(_name, _value)
