"""Reference cases of text, data and evaluation."""

from realm_core.compat.golden_case import Family

FAMILIES: dict[str, Family] = {}
