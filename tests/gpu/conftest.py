"""What must be set before the first test uses a GPU."""

import os

# PyTorch reads it once: without it, eager products refuse to run under deterministic algorithms, which poison memory.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
