"""Schemas: the types of settings and of what files hold, and the one way in which they are read and checked.

A schema is a dataclass made by `schema`, which checks its fields whenever one is made, or any other type that `check`
takes. Nothing is converted: "false" is not a boolean, True is not a number, and 3.0 is not a whole one.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, cast

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from pydantic_core import CoreSchema, core_schema, from_json
from typing_extensions import dataclass_transform

from dspa.errors import refusal

E = TypeVar("E", bound=Exception)
T = TypeVar("T")

# Characters of a wrong value that a message shows.
SHOWN = 200
# Kinds of values in words, by pydantic's names of their errors.
KINDS = {"dataclass_type": "an object", "dict_type": "an object", "list_type": "a list"}
# Messages about errors that have no value of their own.
NAMED_ERRORS = {
    "missing": ("missing", "all settings that have no default"),
    "unexpected_keyword_argument": ("not known", "names that this version of dspa-kernels knows"),
    "unexpected_positional_argument": ("one value too many", "one value per field"),
}


@dataclasses.dataclass(frozen=True)
class Accepts:
    """The values that a type accepts, in words: an annotation, for the message about any other value."""

    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the type, with these words in place of its errors."""
        return core_schema.custom_error_schema(handler(source), "accepts", custom_error_message=self.words)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """An annotation of a text that is one of `names`."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of these texts, with them in place of its errors."""
        words = ", ".join(self.names)
        return core_schema.custom_error_schema(
            core_schema.literal_schema(list(self.names)), "accepts", custom_error_message=words
        )


def _day(text: str) -> str:
    if date.fromisoformat(text).isoformat() != text:
        raise ValueError(text)
    return text


Text: TypeAlias = Annotated[StrictStr, Accepts("text")]
Day: TypeAlias = Annotated[StrictStr, AfterValidator(_day), Accepts("a date, as 2026-03-01")]
Flag: TypeAlias = Annotated[StrictBool, Accepts("true or false")]
Count: TypeAlias = Annotated[StrictInt, Field(ge=0), Accepts("a whole number >= 0")]
PositiveInt: TypeAlias = Annotated[StrictInt, Field(ge=1), Accepts("a whole number >= 1")]
# Random generators take 32 bits where numpy's is among them, and else 64.
Seed32: TypeAlias = Annotated[StrictInt, Field(ge=0, lt=2**32), Accepts("a whole number from 0 to 2**32 - 1")]
Seed: TypeAlias = Annotated[StrictInt, Field(ge=0, lt=2**63), Accepts("a whole number from 0 to 2**63 - 1")]
Number: TypeAlias = Annotated[StrictFloat, Field(allow_inf_nan=False), Accepts("a finite number")]
# Whole numbers stay whole, where a float would make 3 of them 3.0.
AnyNumber: TypeAlias = Annotated[StrictInt | StrictFloat, Accepts("a number")]
NonNegative: TypeAlias = Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False), Accepts("a finite number >= 0")]
Positive: TypeAlias = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False), Accepts("a finite number > 0")]
Fraction: TypeAlias = Annotated[StrictFloat, Field(ge=0, le=1), Accepts("a number from 0 to 1")]
# A share of a variance, less than 0 where the error is larger than it.
Explained: TypeAlias = Annotated[StrictFloat, Field(le=1, allow_inf_nan=False), Accepts("a finite number <= 1")]
Percentile: TypeAlias = Annotated[StrictFloat, Field(ge=0, le=100), Accepts("0 to 100")]


def whole(least: int, most: int | None, words: str) -> Any:
    """Return the type of whole numbers from `least` to `most`, None for no limit, that messages describe by `words`."""
    return Annotated[StrictInt, Field(ge=least, le=most), Accepts(words)]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def schema(cls: type[T]) -> type[T]:
    """Make a frozen dataclass that checks its fields against their types, and then calls its `__post_init__`.

    It raises `ValueError`, in the form of `refusal`.
    """
    made: Any = dataclass(cls, frozen=True, config=ConfigDict(extra="forbid"))
    initialise = made.__init__

    @wraps(initialise)
    def checked(self: T, *values: Any, **named: Any) -> None:
        # By their names, which messages then say; what is given twice stays for an error of its own.
        names = [field.name for field in dataclasses.fields(made)][: len(values)]
        if len(names) == len(values) and not {*names} & {*named}:
            values, named = (), dict(zip(names, values, strict=True)) | named
        try:
            initialise(self, *values, **named)
        except ValidationError as error:
            raise _refused(error, ValueError) from error

    made.__init__ = checked
    return cast(type[T], made)


def check(kind: type[T], value: object, error: type[E], what: str, advice: str = "") -> T:
    """Return a value out of JSON as an instance of a schema.

    Args:
        kind: a class made by `schema`, or another type.
        value: the value.
        error: class of the error.
        what: name of the value in the message.
        advice: what to do, as a whole sentence.

    Raises:
        E: the value does not fit the schema.
    """
    try:
        checked: T = _adapter(cast(Any, kind)).validate_python(value)
        return checked
    except ValidationError as failed:
        raise _refused(failed, error, what, advice) from failed


def parse_json(text: str, error: type[E], what: str, accepted: str = "JSON", advice: str = "") -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text.
        error: class of the error.
        what: name of the text in the message.
        accepted: texts that are accepted.
        advice: what to do, as a whole sentence.

    Raises:
        E: another text, nesting of more than 200 levels, or an object with two values of one name.
    """
    try:
        # It refuses deep nesting, by which `json` and much of what reads its values would exceed Python's stack.
        from_json(text)
        return json.loads(text, object_pairs_hook=_once)
    # TypeError: text with half of a surrogate pair.
    except (TypeError, ValueError) as failed:
        raise refusal(error, what, f"not JSON ({failed}): {text[:60]!r}", accepted, advice) from failed


def is_json(text: str) -> bool:
    """Return True for a text that is one whole JSON value."""
    try:
        from_json(text)
    except (TypeError, ValueError):
        return False
    return True


def read_json(path: Path, error: type[E], advice: str = "") -> Any:
    """Return the value of a JSON file.

    Raises:
        E: as for `parse_json`, or a file that is not text in UTF-8.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as failed:
        raise refusal(error, str(path), f"not text ({failed})", "JSON in UTF-8", advice) from failed
    return parse_json(text, error, str(path), advice=advice)


def check_at_most(name: str, value: float, of: str, number: int) -> None:
    """Raise `ValueError` for a count above the number of what is counted."""
    if value > number:
        raise refusal(ValueError, f"`{name}`", value, f"at most {number}, the number of {of}")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise if a name has two values, of which `json` would keep the last."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        # Not by setdefault: NaN differs from itself.
        if name in values and values[name] != value:
            raise ValueError(f"{name!r} is given twice, as {values[name]!r} and as {value!r}")
        values[name] = value
    return values


def _refused(failed: ValidationError, error: type[E], what: str = "", advice: str = "") -> E:
    """Return the error about the first value that does not fit a schema."""
    details = failed.errors(include_url=False)[0]
    # Of a rule in `__post_init__`.
    if rule := details.get("ctx", {}).get("error"):
        return error(f"{what}: {rule} {advice}".rstrip() if what else str(rule))
    place = ".".join(map(str, details["loc"]))
    name = ": ".join(filter(None, (what, f"`{place}`" if place else "")))
    if known := NAMED_ERRORS.get(details["type"]):
        return refusal(error, name, *known, advice)
    got = repr(details["input"])
    got = got if len(got) <= SHOWN else f"{got[:SHOWN]}..."
    accepted = KINDS.get(details["type"], details["msg"].removeprefix("Input should be "))
    return refusal(error, name, got, accepted, advice)
