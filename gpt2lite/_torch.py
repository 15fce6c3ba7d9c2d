"""Imports torch before anything else does, without its warning that numpy, which nobody needs, is missing."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch  # noqa: F401
