"""Shapes written as text."""

import pytest

from iokernels.testing.case.shape import Dimension, UsageError, Vocabulary

WORDS = Vocabulary(
    "toy",
    (
        Dimension("b", 4, "batch", always=True),
        Dimension("n", 128, "length", always=True),
        Dimension("nk", "n", "keys"),
        Dimension("left", -1, "window", least=-1),
        Dimension("p", 0.0, "probability"),
        Dimension("flag", 0, "switch", most=1),
    ),
)


def test_defaults_follow_the_dimension_they_name() -> None:
    assert dict(WORDS.parse("n=7")) == {"b": 4, "n": 7, "nk": 7, "left": -1, "p": 0.0, "flag": 0}
    assert WORDS.parse("n=7,nk=9").nk == 9


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("n=2k", "n", 2048),
        ("n=1M", "n", 2**20),
        (" n = 3 , b=1", "n", 3),
        ("p=0.25", "p", 0.25),
        ("left=-1", "left", -1),
    ],
)
def test_numbers(text: str, name: str, value: float) -> None:
    assert WORDS.parse(text)[name] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m=3", "toy has no dimension 'm'; it has b, n, nk, left, p, flag"),
        ("n", "'n' is not of the form name=number"),
        ("n=", "n= is not a whole number"),
        ("n=1.5", "n=1.5 is not a whole number"),
        ("p=x", "p=x is not a number"),
        ("p=nan", "p=nan; it must be at least 0"),
        ("p=inf", "p=inf; it must be at least 0"),
        ("n=-1", "n=-1; it must be at least 0"),
        ("flag=2", "flag=2; it must be from 0 to 1"),
        ("n=1,n=2", "n is given twice"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        WORDS.parse(text)


@pytest.mark.parametrize("text", ["b=4,n=128", "b=1,n=2k,nk=5", "b=4,n=9,left=3,p=0.5,flag=1"])
def test_text_and_shape_are_inverse(text: str) -> None:
    shape = WORDS.parse(text)
    assert WORDS.parse(str(shape)) == shape
    assert hash(WORDS.parse(str(shape))) == hash(shape)


def test_only_what_differs_from_the_default_is_printed() -> None:
    assert str(WORDS.parse("n=9,nk=9,flag=1")) == "b=4,n=9,flag=1"
    assert str(WORDS.parse("n=9").replace(n=5)) == "b=4,n=5,nk=9"


def test_a_shape_is_not_mistaken_for_a_place_to_write() -> None:
    shape = WORDS.parse("n=9")
    with pytest.raises(AttributeError):
        shape.n = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        _ = shape.width
