"""One way to say when."""

from datetime import datetime, timezone


def utc_now() -> str:
    """The time in UTC, to the second, as ISO 8601 has it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
