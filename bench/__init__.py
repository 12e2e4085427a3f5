"""Benchmarks: Berth against its peers, on the same inputs, in the same run. See README.md."""
