"""Errors about models, maps and adapters; those about data and SAE files live with their readers."""


class ModelError(RuntimeError):
    """A model, or a call of it, that cannot be steered or read as asked."""


class MapError(ValueError):
    """A conditional-difference map that is damaged, or does not belong to what it is used with."""


class AdapterError(ValueError):
    """An FSRL adapter that is damaged, or does not belong to what it is used with."""


class PreferenceError(ValueError):
    """A source of triples, or one triple, that cannot be used; the message names it and says what to do."""


class TextError(ValueError):
    """A file of text that cannot be used; the message names the line and says what to do."""


class TrainingError(ValueError):
    """A training that cannot begin, or go on, as asked."""


class LabelError(ValueError):
    """Labels or rules that cannot be used; the message names the file and the numbers."""


class SAEError(ValueError):
    """An SAE, or a file of one, that cannot be used; the message says why and what would be accepted."""


def refuse(name: str, got: object, accepted: str, advice: str = "") -> SAEError:
    """The error for one bad argument or file, to be raised by the caller."""
    return SAEError(f"{name} is {got}; accepted: {accepted}. {advice}".rstrip())
