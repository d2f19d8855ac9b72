"""Typed errors of the package, and its warnings.

Every message is one sentence that says what is wrong, where, the value found, and last the cure.
"""


class RLSEditError(Exception):
    """Base class of every error that this package raises on purpose."""


class InputError(RLSEditError):
    """What was given can't be used: settings, requests, a model, a text. Nothing was changed; commands end
    with status 2.
    """


class HyperParamsError(InputError, ValueError):
    """A setting is unknown, misspelt, of the wrong type, or out of range."""


class RequestError(InputError, ValueError):
    """An edit request is incomplete or contradicts itself.

    Attributes:
        index: position of the request in the list given, or None for a single one.
        field: name of the offending field.
    """

    def __init__(self, message: str, *, index: int | None = None, field: str = "") -> None:
        where = "Request" if index is None else f"Request {index}"
        super().__init__(f"{where}, field '{field}': {message}" if field else f"{where}: {message}")
        self.problem = message
        self.index = index
        self.field = field

    def at(self, index: int) -> "RequestError":
        """The same error, told of the request at this position."""
        return RequestError(self.problem, index=index, field=self.field)


class ArgumentError(InputError, TypeError):
    """An argument is of another kind than the function takes."""


class ModelError(InputError, OSError):
    """A model or its tokenizer can't be loaded, the two don't belong together, or there is no such device."""


class LayoutError(InputError, LookupError):
    """A module that the settings name is missing from the model, or is of a kind that can't be edited."""


class DataError(InputError, ValueError):
    """A file of records can't be read, is of no known form, or holds nothing to edit."""


class TextError(DataError):
    """A text file can't be read, is not UTF-8, or is empty."""


class AnchorError(InputError, ValueError):
    """Second moments or anchor pairs are missing, unreadable, or of another width."""


class NumericalError(RLSEditError, ArithmeticError):
    """A matrix is not positive definite, or a tensor holds NaN or infinity."""


class PrecisionError(NumericalError):
    """What was asked for needs more digits than the state's dtype has."""


class StateMismatchError(RLSEditError, RuntimeError):
    """The model, its weights or the settings are not those that the editor's state describes."""


class GateError(RLSEditError, RuntimeError):
    """A gated memory is missing, of another model, or was given a part of a pass."""


class LedgerError(RLSEditError, OSError):
    """The ledger on disk can't be read or written, is damaged, or is held by another editor."""


class HostError(RLSEditError, ImportError):
    """EasyEdit is missing, can't be imported, or has no place for RLSEdit."""


class RLSEditWarning(UserWarning):
    """Something that works, but not as well as it should."""


class UnsaidWarning(RLSEditWarning):
    """A batch was edited, but the model does not say some of its facts."""


class FillWarning(RLSEditWarning):
    """The memory of an edited layer is nearly full."""
