"""Codes of what happened to a latent of a row, one byte each: all that the backward needs of the forward."""

# v = 0; v > 0; v < 0 with f + v > 0; v < 0 with f > 0 >= f + v, so that the latent goes to 0; v < 0 with f = 0.
STAYS, UP, DOWN, OFF, IDLE = range(5)
# Added where a JumpReLU's threshold is within half a bandwidth of u, and f + v > 0.
NEAR = 8
