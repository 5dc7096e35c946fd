"""Methods that DSPA is compared with, and controls: DSPA with one of its parts replaced."""
