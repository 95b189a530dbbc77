"""Crontab expressions of five fields: a strict reading, so that what is accepted here no scheduler refuses later."""

import re

_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_DAYS = "sun mon tue wed thu fri sat".split()
_FIELDS: tuple[tuple[str, int, int, list[str]], ...] = (
    ("minute", 0, 59, []),
    ("hour", 0, 23, []),
    ("day of the month", 1, 31, []),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 7, _DAYS),
)
_LONGEST = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)  # days of the months
_PART = re.compile(r"(?:\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>\d{1,4}))?", re.ASCII)


def problem_with(expression: str) -> str | None:
    """What is wrong with a crontab expression, in words; None if it names times that come.

    Numbers, names of months and days, `*`, ranges that rise, lists and steps are known; nicknames such as @daily are not.
    """
    fields = expression.lower().split()
    if len(fields) != len(_FIELDS):
        return f"{len(fields)} fields, expected minute, hour, day, month, day of the week"
    allowed = []
    for text, (name, low, high, names) in zip(fields, _FIELDS, strict=True):
        values = [_values(part, low, high, names) for part in text.split(",")]
        if None in values:
            return f"{name} {text!r}: expected numbers from {low} to {high}, *, lists, ranges or steps of them"
        allowed.append({value for some in values for value in some or ()})
    if fields[4].startswith("*") and min(allowed[2]) > max(_LONGEST[month - 1] for month in allowed[3]):
        return f"day {fields[2]} of month {fields[3]} never comes"
    return None


def _values(part: str, low: int, high: int, names: list[str]) -> range | None:
    """The numbers that one part of a field stands for; None if it is no such part."""
    match = _PART.fullmatch(part)
    if match is None:
        return None
    step = int(match["step"]) if match["step"] else 1
    first = low if match["first"] is None else _number(match["first"], low, names)
    last = high if match["first"] is None or (match["step"] and not match["last"]) else first
    if match["last"]:
        last = _number(match["last"], low, names)
    if first is None or last is None or not (low <= first <= last <= high and 1 <= step <= high):
        return None
    return range(first, last + 1, step)


def _number(text: str, low: int, names: list[str]) -> int | None:
    if text in names:
        return names.index(text) + low
    return int(text) if re.fullmatch(r"\d{1,2}", text, re.ASCII) else None
