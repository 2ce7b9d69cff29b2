"""The layers of `harness.check`: counters, a paired comparison with another commit, the history of figures."""
