from __future__ import annotations

import pytest

from nybble.server.requests.json_pointer import value_at

# The examples of RFC 6901, section 6, those that a schema may have.
DOCUMENT = {"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, " ": 7, "m~n": 8, "null": None}


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("#", DOCUMENT),
        ("#/foo", ["bar", "baz"]),
        ("#/foo/0", "bar"),
        ("#/", 0),
        ("#/a~1b", 1),
        ("#/c%25d", 2),
        ("#/e%5Ef", 3),
        ("#/%20", 7),
        ("#/m~0n", 8),
        ("#/null", None),
    ],
)
def test_a_reference_leads_to_a_value(reference: str, value: object) -> None:
    assert value_at(DOCUMENT, reference) == value


@pytest.mark.parametrize(
    "reference",
    ["", "foo", "other.json#/foo", "#/bar", "#/foo/2", "#/foo/-", "#/foo/²", "#/foo/0/1", "#/null/a"],
)
def test_one_that_leads_nowhere_is_an_error(reference: str) -> None:
    with pytest.raises(LookupError):
        value_at(DOCUMENT, reference)


def test_an_index_of_many_digits_is_not_read() -> None:
    with pytest.raises(LookupError):
        value_at(["x"], "#/" + "0" * 5000)
