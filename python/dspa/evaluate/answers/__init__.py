"""Answers of methods to the questions of a benchmark, in files that the benchmark's own judges read."""
