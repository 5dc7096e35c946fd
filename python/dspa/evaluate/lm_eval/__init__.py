"""Tasks of lm-evaluation-harness, under the methods of a comparison."""
