"""TOML as the configuration uses it: a document read, and a value written in one line."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from difftrain.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """The keys of a TOML document; raises UserError, which names ``origin``, for what is none."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} is not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{origin} is nested too deep to be a configuration") from None


def inline(value: Any, name: str) -> str:
    """Tables, lists, words, numbers and truth values as TOML in one line; raises UserError for others."""
    if isinstance(value, dict):
        pairs = (f"{_key(key)} = {inline(item, name)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(inline(item, name) for item in value) + "]"
    if isinstance(value, (str, bool, int)):  # JSON's are TOML's
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return repr(value)
    raise UserError(
        f"{name} must hold tables, lists, words and numbers, got {type(value).__name__} {value}"
    )


def _key(key: Any) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", str(key)) else json.dumps(str(key), ensure_ascii=False)
