"""What the machine can do: bandwidth, memory, device readings."""
