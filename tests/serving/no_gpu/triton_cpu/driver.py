"""The driver of the backend."""

from triton.backends.driver import DriverBase


class Driver(DriverBase):
    """Abstract methods that are never called."""

    @classmethod
    def is_active(cls) -> bool:
        return True


Driver.__abstractmethods__ = frozenset()
# Triton takes the one class of this module that is a driver.
del DriverBase
