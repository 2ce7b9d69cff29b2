"""Which expert is in which slot: the decisions of the expert cache."""
