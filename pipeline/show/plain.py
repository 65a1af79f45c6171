"""Results on stdout without a table: words, or one JSON document."""

import json
import sys
from datetime import UTC, datetime
from typing import Any

from pipeline.show.figures import printable

SCHEMA_VERSION = 1


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document, with the version of its schema."""
    # Where stdout cannot say every character, JSON has its own way to.
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    whole = {"schema_version": SCHEMA_VERSION, **document}
    text = json.dumps(whole, ensure_ascii=ascii_only, indent=2, default=_encode)
    sys.stdout.write(text + "\n")


def _encode(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    raise TypeError(type(value).__name__)


def print_text(text: str) -> None:
    """Print plain words on stdout."""
    sys.stdout.write(printable(text) + "\n")
