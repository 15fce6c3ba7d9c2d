"""What a model says: `generate`, `generate_tokens`, which yields it as it comes, and `classify`."""

from gpt2lite.generation.classifying import Classification, classify
from gpt2lite.generation.decoding import GenerateOptions, generate, generate_tokens
from gpt2lite.generation.engines import ENGINES, KVCache, LanguageModel
from gpt2lite.generation.prompts import Instruction

__all__ = [
    "ENGINES",
    "Classification",
    "GenerateOptions",
    "Instruction",
    "KVCache",
    "LanguageModel",
    "classify",
    "generate",
    "generate_tokens",
]
