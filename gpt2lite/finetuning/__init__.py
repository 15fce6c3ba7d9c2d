"""Training a loaded model further, in memory that is known before the first step."""
