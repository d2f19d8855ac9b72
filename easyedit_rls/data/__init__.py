"""Example data, written for this package."""
