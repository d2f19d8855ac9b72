"""Settings for a new model: a search for the best ones, and causal tracing as advice for the layers."""
