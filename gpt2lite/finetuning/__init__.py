"""Training a loaded model further, in memory that is known before the first step."""

from gpt2lite.finetuning.data import Batch
from gpt2lite.finetuning.forecast import TrainingForecast, forecast_training
from gpt2lite.finetuning.heads import as_classifier
from gpt2lite.finetuning.loop import Metrics, finetune
from gpt2lite.finetuning.lora import add_lora, merge_lora
from gpt2lite.finetuning.recipe import Recipe
from gpt2lite.finetuning.states import Task, load_lora

__all__ = [
    "Batch",
    "Metrics",
    "Recipe",
    "Task",
    "TrainingForecast",
    "add_lora",
    "as_classifier",
    "finetune",
    "forecast_training",
    "load_lora",
    "merge_lora",
]
