"""Text out of a model: `generate`, and `generate_tokens`, which yields tokens as they come."""

from gpt2lite.generation.cache import KVCache, cache_bytes
from gpt2lite.generation.decoding import (
    GenerateOptions,
    generate,
    generate_tokens,
    require_fit,
    require_language_head,
)
from gpt2lite.generation.engines import ENGINES, LanguageModel

__all__ = [
    "ENGINES",
    "GenerateOptions",
    "KVCache",
    "LanguageModel",
    "cache_bytes",
    "generate",
    "generate_tokens",
    "require_fit",
    "require_language_head",
]
