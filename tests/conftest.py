"""Before NumPy loads: its BLAS keeps to one thread; several, on a busy machine, mostly wait."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
