"""Errors about models, maps and adapters; those about data and SAE files live with their readers."""


class ModelError(RuntimeError):
    """A model, or a call of it, that cannot be steered or read as asked."""


class MapError(ValueError):
    """A conditional-difference map that is damaged, or does not belong to what it is used with."""


class AdapterError(ValueError):
    """An FSRL adapter that is damaged, or does not belong to what it is used with."""
