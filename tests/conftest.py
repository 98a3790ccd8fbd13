"""Before torch is imported: workers of pytest-xdist share the cores, and so do the processes that tests start. Threads
that wait for each other's turn took twice the time. What an op does on several threads has tests that set them."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
