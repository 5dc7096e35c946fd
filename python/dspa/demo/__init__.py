"""A small world in which all of DSPA runs on a laptop in a minute."""
