"""Hydra configs of the commands."""
