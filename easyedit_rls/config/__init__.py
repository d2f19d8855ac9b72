"""Settings: checked, from files, or made for a model."""
