"""Text out of a model: `generate`, and `generate_tokens`, which yields tokens as they come."""

from gpt2lite.generation.cache import KVCache, cache_bytes
from gpt2lite.generation.decoding import generate, generate_tokens, require_language_head
from gpt2lite.generation.engines import ENGINES

__all__ = ["ENGINES", "KVCache", "cache_bytes", "generate", "generate_tokens", "require_language_head"]
