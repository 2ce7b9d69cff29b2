"""Which requests run together."""
