"""gpt2lite: a minimal GPT-2 whose constructors know memory.

A public name is imported when it is first used (PEP 562): `import gpt2lite` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING

from gpt2lite._version import __version__ as __version__

if TYPE_CHECKING:  # for type checkers and editors; `_HOMES` says the same to Python, and a test compares them
    from gpt2lite.config import GPTConfig as GPTConfig
    from gpt2lite.converting import ConvertOptions as ConvertOptions
    from gpt2lite.converting import convert as convert
    from gpt2lite.converting import save_per_tensor as save_per_tensor
    from gpt2lite.errors import CheckpointError as CheckpointError
    from gpt2lite.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from gpt2lite.errors import GPT2LiteError as GPT2LiteError
    from gpt2lite.errors import InsufficientMemoryError as InsufficientMemoryError
    from gpt2lite.errors import TrainingDivergedError as TrainingDivergedError
    from gpt2lite.errors import UsageError as UsageError
    from gpt2lite.evaluation import Evaluation as Evaluation
    from gpt2lite.evaluation import evaluate as evaluate
    from gpt2lite.finetuning.data import Batch as Batch
    from gpt2lite.finetuning.forecast import TrainingForecast as TrainingForecast
    from gpt2lite.finetuning.forecast import forecast_training as forecast_training
    from gpt2lite.finetuning.heads import as_classifier as as_classifier
    from gpt2lite.finetuning.loop import finetune as finetune
    from gpt2lite.finetuning.lora import merge_lora as merge_lora
    from gpt2lite.finetuning.recipe import Recipe as Recipe
    from gpt2lite.finetuning.states import Task as Task
    from gpt2lite.finetuning.states import load_lora as load_lora
    from gpt2lite.generation import GenerateOptions as GenerateOptions
    from gpt2lite.generation import generate as generate
    from gpt2lite.generation import generate_tokens as generate_tokens
    from gpt2lite.loading import STRATEGIES as STRATEGIES
    from gpt2lite.loading import Forecast as Forecast
    from gpt2lite.loading import LoadOptions as LoadOptions
    from gpt2lite.loading import OpenOptions as OpenOptions
    from gpt2lite.loading import Tuning as Tuning
    from gpt2lite.model import GPTModel as GPTModel
    from gpt2lite.model import forecast as forecast
    from gpt2lite.model import open_model as open_model
    from gpt2lite.opening import Opened as Opened
    from gpt2lite.opening import load_module as load_module
    from gpt2lite.tracking import MemoryUse as MemoryUse
    from gpt2lite.tracking import clean_up as clean_up
    from gpt2lite.tracking import track_memory as track_memory

_HOMES = {
    "config": "GPTConfig",
    "converting": "ConvertOptions convert save_per_tensor",
    "errors": "CheckpointError CheckpointNotFoundError GPT2LiteError InsufficientMemoryError "
    "TrainingDivergedError UsageError",
    "evaluation": "Evaluation evaluate",
    "finetuning.data": "Batch",
    "finetuning.forecast": "TrainingForecast forecast_training",
    "finetuning.heads": "as_classifier",
    "finetuning.loop": "finetune",
    "finetuning.lora": "merge_lora",
    "finetuning.recipe": "Recipe",
    "finetuning.states": "Task load_lora",
    "generation": "GenerateOptions generate generate_tokens",
    "loading": "STRATEGIES Forecast LoadOptions OpenOptions Tuning",
    "model": "GPTModel forecast open_model",
    "opening": "Opened load_module",
    "tracking": "MemoryUse clean_up track_memory",
}
_MODULES = {name: f"gpt2lite.{module}" for module, names in _HOMES.items() for name in names.split()}
__all__ = ["__version__", *_MODULES]


if not TYPE_CHECKING:  # a type checker that sees it finds no misspelt name any more

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        importlib.import_module("gpt2lite._torch")  # the first to import torch, without its warning
        found = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return found


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
