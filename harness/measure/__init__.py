"""Measurement: workloads, the runner and the statistics."""
