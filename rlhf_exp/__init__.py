"""Which reward and which algorithm align a language model better: one command, one loop, honest
statistics.
"""

import os

__version__ = "0.1.0"

# Before torch is imported: waiting OpenMP threads that spin cost shared cores a factor of five to
# ten.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
