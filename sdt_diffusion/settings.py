"""How one run's settings differ from another's."""

from collections.abc import Collection, Mapping
from typing import Any


def differences(there: Mapping[str, Any], now: Mapping[str, Any], unquoted: Collection[str] = ()) -> list[str]:
    """What differs, in words.

    Args:
        there: Settings that were found.
        now: Settings of this run.
        unquoted: Keys whose values are too long to be shown.

    Returns:
        A text for each key that differs.
    """
    return [
        key if key in unquoted else f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(set(there) | set(now))
        if there.get(key) != now.get(key)
    ]
