"""Text out of a model: `generate`, and `generate_tokens`, which yields tokens as they come."""

from gpt2lite.generation.decoding import GenerateOptions, generate, generate_tokens
from gpt2lite.generation.engines import ENGINES, KVCache, LanguageModel

__all__ = ["ENGINES", "GenerateOptions", "KVCache", "LanguageModel", "generate", "generate_tokens"]
