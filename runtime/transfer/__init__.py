"""How expert bytes get from where they rest into slots on the compute device."""
