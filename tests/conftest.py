"""Every test process computes on one thread, so that the suite runs one process per core and timings do not depend on neighbours."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("fixed")
