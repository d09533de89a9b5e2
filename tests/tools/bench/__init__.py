"""Benchmarks: `make bench` prints ratios against a rival measured in the same run, and writes build/bench.json."""
