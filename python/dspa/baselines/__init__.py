"""Methods that DSPA is compared with."""
