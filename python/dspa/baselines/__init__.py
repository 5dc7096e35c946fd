"""What DSPA is compared with."""
