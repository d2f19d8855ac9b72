"""Editors: from requests to written weights."""
