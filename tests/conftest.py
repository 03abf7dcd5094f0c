"""Before NumPy loads: its BLAS keeps to one thread, as several on a busy machine mostly wait for one another."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
