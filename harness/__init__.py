"""Commands around the engine: tune, bench, probe, and the bundled demo model."""
