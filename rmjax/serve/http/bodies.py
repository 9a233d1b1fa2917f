"""The bodies of requests and replies. Their checks and the OpenAPI schema have one source.

A request names its users in one list. All other lists have one entry for each user, in the same
order, and so have the lists of the reply.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import msgspec
from msgspec import Meta, Struct

INT64 = Meta(ge=-(2**63), le=2**63 - 1)
User = str | Annotated[int, INT64]
Id = str | Annotated[int, INT64]
Score = float | None  # None: the item is unknown to the model, or the score is not a number
T = TypeVar("T")

Users = Annotated[
    list[User],
    Meta(
        min_length=1,
        description="Users, each a string or an integer of 64 bits.",
        examples=[["ann", 7]],
    ),
]
Unknown = Annotated[int, Meta(description="Number of ids that the model does not know.")]


class Refused(Exception):
    """A request that gets an error reply.

    Args:
      status: of the reply.
      error: the cause and the cure.
      field: the field of the body or the query that has the fault.
      **more: other fields of `Error`.
    """

    def __init__(self, status: int, error: str, field: str | None = None, **more: Any):
        super().__init__(error)
        self.status = status
        self.reply = Error(_escaped(error), field and _escaped(field), **more)


class Error(Struct, frozen=True, omit_defaults=True):
    """Why a request was refused, and what helps."""

    error: Annotated[str, Meta(description="The cause and the cure.")]
    field: Annotated[str | None, Meta(description="The field that has the fault.")] = None
    user: Annotated[User | None, Meta(description="The user whom the error is about.")] = None
    actual: Annotated[int | None, Meta(description="The length of this user's stream.")] = None
    id: Annotated[str | None, Meta(description="The log of the server has this id.")] = None


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of a request; a GET request has them in its query."""


class Write(Request, frozen=True):
    """Appends items to the streams of users."""

    users: Users
    items: Annotated[
        list[list[Id]],
        Meta(
            description="For each user a list of item ids, the oldest first. Ids that the model "
            "does not know are left out.",
            examples=[[[3, 14], [9]]],
        ),
    ]
    expected_lengths: Annotated[
        list[Annotated[int, Meta(ge=0, le=2**63 - 1)] | None] | None,
        Meta(
            description="For each user the length of the stream before this write, or null for "
            "any. If one does not fit, nothing is written, and the reply is 409 with the length.",
            examples=[[12, None]],
        ),
    ] = None


class Written(Struct, frozen=True):
    """The streams after a write."""

    lengths: Annotated[list[int], Meta(description="For each user the length of the stream.")]
    unknown: Unknown


class Ask(Request, frozen=True):
    """Asks the memories of users."""

    users: Users
    queries: Annotated[
        list[list[Id]],
        Meta(
            description="For each user a list of item ids; or kinds of question, 0 and up, where "
            "the model is asked about kinds.",
            examples=[[[26, 5], [3]]],
        ),
    ]


class Answered(Struct, frozen=True):
    """Answers to queries."""

    answers: Annotated[
        list[list[Score | list[Score]]],
        Meta(
            description="For each user one answer for each query: a score, or the scores of every "
            "class or item. Null for an item that the model does not know."
        ),
    ]
    unknown: Unknown


class Recommend(Request, frozen=True):
    """Asks for the best next items of users."""

    users: Users
    k: Annotated[int, Meta(ge=1, le=1000, description="How many items.")] = 10
    exclude: Annotated[
        list[list[Id]] | None,
        Meta(
            description="For each user a list of item ids that are left out; null: none.",
            examples=[[[3, 14], []]],
        ),
    ] = None


class Recommendations(Struct, frozen=True):
    """The best items of users, the best one first; fewer than k where fewer are left."""

    items: Annotated[list[list[Id]], Meta(description="For each user the ids of the items.")]
    scores: Annotated[list[list[Score]], Meta(description="For each user the items' scores.")]
    unknown: Unknown


class Fork(Request, frozen=True):
    """Copies the stream of a user to new users."""

    user: Annotated[User, Meta(description="The user whose stream is copied.", examples=["ann"])]
    copies: Users


class Reset(Request, frozen=True):
    """Forgets users."""

    users: Users


class Done(Struct, frozen=True):
    """The request has taken effect."""

    users: Annotated[int, Meta(description="Number of users that it was about.")]


class OfUser(Request, frozen=True):
    """How the path names the user."""

    type: Annotated[
        Literal["str", "int"], Meta(description="Whether the user is a string or an integer.")
    ] = "str"


class Info(Struct, frozen=True):
    """The stream of a user."""

    user: User
    length: Annotated[int, Meta(description="Number of items that were written.")]
    age: Annotated[float, Meta(description="Seconds since the last write.")]
    bytes: Annotated[int, Meta(description="Bytes that the stream takes; they do not grow.")]


class Memory(Struct, frozen=True):
    """The memory of a user."""

    slots: Annotated[
        list[list[Score]] | None,
        Meta(description="Numbers [slots, dim]; null where the memory has another form."),
    ]
    leaves: Annotated[
        dict[str, Any],
        Meta(description="Every array by its name, as nested lists; empty if there are slots."),
    ]


class Search(Request, frozen=True):
    """A search in the catalogue."""

    query: Annotated[str, Meta(description="Text that the ids contain; empty: any.")] = ""
    limit: Annotated[int, Meta(ge=1, le=1000, description="Most items of the reply.")] = 50


class Items(Struct, frozen=True):
    """Items of the catalogue."""

    items: Annotated[list[Id], Meta(description="Ids, in the order of the model.")]
    total: Annotated[int, Meta(description="Number of all items that the model knows.")]
    ranks: Annotated[bool, Meta(description="Whether /v1/recommend ranks these items.")]
    queries: Annotated[bool, Meta(description="Whether /v1/answer is asked about these items.")]


class Status(Struct, frozen=True):
    """The state of the server."""

    status: str


def decoded(body: bytes, form: type[T]) -> T:
    """Reads the body of a request.

    Args:
      body: JSON in UTF-8.
      form: a subclass of `Request`.

    Returns:
      The body.

    Raises:
      Refused: it is no JSON, a key occurs twice, or a field is missing, unknown or wrong.
    """
    try:
        fields = json.loads(body.decode(), object_pairs_hook=once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # also of bytes that are not UTF-8
        cause = "the lists are nested too deep" if isinstance(error, RecursionError) else error
        raise Refused(400, f"the body is no JSON ({cause}): send one object in UTF-8") from None
    return checked(fields, form)


def checked(fields: Any, form: type[T], *, strict: bool = True) -> T:
    """Checks the fields of a request.

    Args:
      fields: names and values.
      form: a subclass of `Request`.
      strict: whether a string is no number; queries of URLs have strings alone.

    Returns:
      The fields as the form has them.

    Raises:
      Refused: a field is missing, unknown or wrong; names the field and the cure.
    """
    try:
        return msgspec.convert(fields, form, strict=strict)
    except msgspec.ValidationError as error:
        _explain(str(error), form)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object or of a query; refuses a name that occurs twice."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise Refused(400, f"{name[:50]!r} occurs twice: give it once", name[:50])
        fields[name] = value
    return fields


def _explain(error: str, form: type) -> NoReturn:
    """Raises Refused for an error of msgspec, such as 'Expected `int` - at `$.users[0]`'."""
    cause, _, path = error.partition(" - at `$")
    _, schemas = msgspec.json.schema_components([form])
    fields = schemas[form.__name__]["properties"]
    place = path.strip("`").removeprefix(".")
    named = re.match(r"\w+", place) or re.search(r"(?<=field `)[^`]*", cause)
    name = named[0] if named else None
    if name in fields:
        cure = fields[name]["description"]
    else:
        cure = f"The fields are {', '.join(fields)}."
    shown = f"{place}: {cause}" if place else cause
    raise Refused(
        400, f"{shown[:200]}. {cure}".replace("`", ""), (place or name or "")[:50] or None
    )


def _escaped(text: str) -> str:
    """A text that UTF-8 can hold; JSON may name halves of characters, which are escaped."""
    return text.encode(errors="backslashreplace").decode()


def _no_constant(name: str) -> NoReturn:
    """Refuses NaN and infinities, which JSON does not have."""
    raise ValueError(f"{name} is no number of JSON")
