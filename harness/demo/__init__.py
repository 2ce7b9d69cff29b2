"""The bundled demo model: its text, its training, and how it is widened to any size. No torch here."""

from __future__ import annotations

DEFAULT_SHARD_BYTES = 512 * 2**20
LAYOUTS = ("hub", "fused")
