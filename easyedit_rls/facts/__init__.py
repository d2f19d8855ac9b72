"""A fact on its way: tokens, keys, values."""
