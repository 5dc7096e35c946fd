"""A small world in which the whole of DSPA runs on a laptop in a minute."""
