"""gpt2lite: a minimal GPT-2 whose constructors know memory."""

from gpt2lite import _torch  # noqa: F401  # first, before another module imports torch
from gpt2lite._version import __version__
from gpt2lite.checkpoint.writing import save_per_tensor
from gpt2lite.config import GPTConfig
from gpt2lite.converting import convert
from gpt2lite.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    GPT2LiteError,
    InsufficientMemoryError,
    TrainingDivergedError,
    UsageError,
)
from gpt2lite.evaluation import Evaluation, evaluate
from gpt2lite.finetuning import (
    Batch,
    Recipe,
    Task,
    TrainingForecast,
    as_classifier,
    finetune,
    forecast_training,
    load_lora,
    merge_lora,
)
from gpt2lite.generation import generate
from gpt2lite.loading import STRATEGIES, Forecast, LoadOptions, OpenOptions, Tuning
from gpt2lite.model import GPTModel, forecast, open_model
from gpt2lite.opening import Opened, load_module
from gpt2lite.tracking import MemoryUse, clean_up, track_memory

__all__ = [
    "STRATEGIES",
    "Batch",
    "CheckpointError",
    "CheckpointNotFoundError",
    "Evaluation",
    "Forecast",
    "GPT2LiteError",
    "GPTConfig",
    "GPTModel",
    "InsufficientMemoryError",
    "LoadOptions",
    "MemoryUse",
    "OpenOptions",
    "Opened",
    "Recipe",
    "Task",
    "TrainingDivergedError",
    "TrainingForecast",
    "Tuning",
    "UsageError",
    "__version__",
    "as_classifier",
    "clean_up",
    "convert",
    "evaluate",
    "finetune",
    "forecast",
    "forecast_training",
    "generate",
    "load_lora",
    "load_module",
    "merge_lora",
    "open_model",
    "save_per_tensor",
    "track_memory",
]
