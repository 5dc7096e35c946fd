"""Steering at inference time: DSPA, and the trace of what it edited."""
