"""The demo's user-facing error."""

from __future__ import annotations


class DemoError(Exception):
    """The message says what was wrong, with the value, and the way out."""
