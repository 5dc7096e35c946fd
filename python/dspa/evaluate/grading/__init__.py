"""Grading of answers by a judge: ratings of single answers, and comparisons with those of a baseline."""
