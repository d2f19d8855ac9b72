"""Requests and records, checked; and facts and texts that come with the package."""
