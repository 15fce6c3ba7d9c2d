"""gpt2lite: a minimal GPT-2 whose constructors know memory."""

from gpt2lite._version import __version__
from gpt2lite.config import GPTConfig
from gpt2lite.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    GPT2LiteError,
    InsufficientMemoryError,
    UsageError,
)
from gpt2lite.loading import STRATEGIES, load_module
from gpt2lite.model import GPTModel

__all__ = [
    "STRATEGIES",
    "CheckpointError",
    "CheckpointNotFoundError",
    "GPT2LiteError",
    "GPTConfig",
    "GPTModel",
    "InsufficientMemoryError",
    "UsageError",
    "__version__",
    "load_module",
]
