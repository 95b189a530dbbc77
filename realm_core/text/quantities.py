"""Date expressions and numbers with a unit, by regular expression."""

import re

_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December|"
    r"Jan\.?|Feb\.?|Mar\.?|Apr\.?|Jun\.?|Jul\.?|Aug\.?|Sept?\.?|Oct\.?|Nov\.?|Dec\.?)"
)
_DAY = r"(?:3[01]|[12]\d|0?[1-9])(?:st|nd|rd|th)?"
_YEAR = r"(?:1\d{3}|20\d{2})"
_ERA = r"(?:\s?(?:AD|BC|CE|BCE)\b)"

# Longest form first: an alternative that matches earlier in this list wins at the same place.
_FORMS = [
    rf"\b{_MONTH}\s{_DAY}(?:\s?[-–]\s?{_DAY})?,?\s{_YEAR}\b",  # July 4, 1969
    rf"\b{_DAY}(?:\s?[-–]\s?{_DAY})?\s(?:of\s)?{_MONTH},?\s{_YEAR}\b",  # 4 July 1969
    rf"\b{_MONTH},?\s(?:of\s)?{_YEAR}\b",  # July 1969
    rf"\b{_MONTH}\s{_DAY}\b",  # July 4
    rf"\b{_DAY}\s(?:of\s)?{_MONTH}(?!\w)",  # 4 July
    rf"\b{_YEAR}[-/]\d{{2}}[-/]\d{{2}}\b",  # 1969-07-04
    rf"\b{_YEAR}s\b",  # 1960s
    rf"(?<![\d.,$€£#/-]){_YEAR}\s?[-–]\s?(?:{_YEAR}|\d\d)(?![\w%°-])(?![.,]\d)",  # 1914–1918
    r"\b\d{1,4}" + _ERA,  # 44 BC
]
_CENTURY = (
    rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)|[A-Z]?[a-z]+th|first|second|third)\scentur(?:y|ies)\b{_ERA}?"  # 19th century
)
# A year alone: no part of a longer number (1,969 or 0.1969), of a range of pages or of a quantity.
_YEAR_ALONE = rf"(?<![\d.,$€£#/-]){_YEAR}(?![\d%°])(?!,\d{{3}})(?!\.\d)(?!-\d{{5,}})(?![-/]?[A-Za-z])"
# All but centuries begin with a digit or with the first letter of a month: asking that first is eight times as fast.
_DATE = re.compile(rf"(?=[\dJFMASOND])(?:{'|'.join([*_FORMS, _YEAR_ALONE])})")
_DATE_OR_CENTURY = re.compile(rf"(?=[\dJFMASOND])(?:{'|'.join(_FORMS)})|{_CENTURY}|(?=\d){_YEAR_ALONE}")

_UNIT = (
    "percent|per cent|hundred|thousand|million|billion|trillion|dollars?|euros?|pounds?|cents?|"
    "km/h|mph|km²|km2|km|kilomet(?:re|er)s?|met(?:re|er)s?|centimet(?:re|er)s?|millimet(?:re|er)s?|cm|mm|nm|m|"
    "miles?|feet|foot|ft|inch(?:es)?|yards?|acres?|hectares?|square|cubic|"
    "kg|kilograms?|grams?|tonnes?|tons?|lb|lbs|oz|litres?|liters?|gallons?|"
    "seconds?|minutes?|hours?|days?|weeks?|months?|years?|decades?|"
    "degrees?|kelvin|hz|khz|mhz|ghz|watts?|kw|mw|gw|volts?|bits?|bytes?|kb|mb|gb|tb|"
    "people|inhabitants|residents|members|students|soldiers|seats|votes|points|goals|games|episodes|copies|species"
)
_SCALE = "hundred|thousand|million|billion|trillion|square|cubic"
_FIGURE = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
_NUMBER = re.compile(
    "|".join(
        [
            rf"(?:US)?[$€£¥]\s?(?:{_FIGURE})(?:\s(?:{_SCALE}))?\b",
            rf"(?<![\w.,-])(?:{_FIGURE})\s?[%°](?:\s?[CF]\b)?",
            rf"(?<![\w.,-])(?:{_FIGURE})[\s-](?:(?:{_SCALE})\s)?(?:{_UNIT})(?![\w/])",
        ]
    ),
    re.IGNORECASE,
)


def date_spans(text: str) -> list[tuple[int, int, str]]:
    """Dates such as "July 1969", "July 4, 1969", "4 July 1969", "July 4", 1969 (1000 to 2099), "1960s"."""
    pattern = _DATE_OR_CENTURY if "centur" in text else _DATE
    return [(match.start(), match.end(), "DATE") for match in pattern.finditer(text)]


def number_spans(text: str) -> list[tuple[int, int, str]]:
    """Numbers together with their unit, currency or percent sign."""
    return [(match.start(), match.end(), "QUANTITY") for match in _NUMBER.finditer(text)]
