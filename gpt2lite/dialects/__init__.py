"""A checkpoint's foreign names → our parameters and config."""
