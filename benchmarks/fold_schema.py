"""The schema as the other contenders read it: from its file, without tollway."""

import json
from pathlib import Path
from typing import Any

import fastavro

USAGE_HEADER = b"\x00\x00\x0f\x42\x40"


def schema() -> Any:
    """usage.avsc without logical types: timestamps stay integers."""
    text = json.loads((Path(__file__).resolve().parent.parent / "schemas" / "usage.avsc").read_text())
    for field in text["fields"]:
        if isinstance(field["type"], dict) and "logicalType" in field["type"]:
            field["type"] = field["type"]["type"]
    return fastavro.parse_schema(text)
