"""A newer build of the whole package, made from this one: a further schema version, and a fold that bills otherwise.

It is what a release looks like to a running deployment: other files under the same name. `PYTHONPATH` says whose they are.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from tollway.schemas.evolution import digest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "tollway"
ROOT = PACKAGE.parent.parent
TEAM_ID = 1_000_003
TEAM = {"name": "team", "type": ["null", "string"], "default": None}
NEWER = 2
"""Its fold version: an `error` bills like an `ok`."""

Edits = dict[str, list[tuple[str, str]]]
"""file → (text that is there, text in its place)"""

USAGE_V2: Edits = {
    "schemas/usage.py": [
        ("    attributes: dict[str, str] | None\n", "    attributes: dict[str, str] | None\n    team: str | None\n"),
        ('"provider", "model")', '"provider", "model", "team")'),
    ],
}
FOLD_V2: Edits = {
    "streams/state.py": [("FOLD_VERSION = 1\n", f"FOLD_VERSION = {NEWER}\n")],
    "streams/billing.py": [
        (
            "def sums(batch: Batch, meters: set[str], window_s: int)",
            "def sums(batch: Batch, meters: set[str], window_s: int, version: int)",
        ),
        ("billed = _billed(batch)", "billed = _billed(batch, version)"),
        ("def _billed(batch: Batch)", "def _billed(batch: Batch, version: int)"),
        (
            'pc.equal(batch.usage.column("status"), BILLED_STATUS)',
            'pc.is_in(batch.usage.column("status"), pa.array([BILLED_STATUS] + ["error"] * (version > 1)))',
        ),
        (
            "in sums(batch, meters, config.billing_window_s):",
            "in sums(batch, meters, config.billing_window_s, directory.fold_version):",
        ),
    ],
}
MIGRATION = "-- the field that UsageEvent v2 adds\nALTER TABLE usage_events ADD COLUMN IF NOT EXISTS team LowCardinality(String);\n"


def usage_v2() -> dict[str, Any]:
    """UsageEvent with one field more."""
    schema: dict[str, Any] = json.loads((PACKAGE / "schemas" / "usage.avsc").read_text(encoding="utf-8"))
    return {**schema, "fields": [*schema["fields"], TEAM]}


def newer_build(folder: Path, edits: Edits | None = None) -> dict[str, str]:
    """The build in `folder`; returns the environment that runs it. `edits`: beside the schema, the fold's change by default."""
    package = folder / "tollway"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in {**USAGE_V2, **(FOLD_V2 if edits is None else edits)}.items():
        text = (package / name).read_text(encoding="utf-8")
        for old, new in changes:
            if old not in text:
                raise LookupError(f"{name} no longer has {old!r}: say the change anew")
            text = text.replace(old, new)
        (package / name).write_text(text, encoding="utf-8")
    schemas, schema = package / "schemas", usage_v2()
    (schemas / "usage_v2.avsc").write_text(json.dumps(schema), encoding="utf-8")
    _entry(schemas / "ids.json", {"record": "UsageEvent", "version": 2, "file": "usage_v2.avsc"})
    _entry(schemas / "digests.json", digest(schema))
    (package / "connectors" / "clickhouse" / "0999_team.sql").write_text(MIGRATION, encoding="utf-8")
    return {"PYTHONPATH": str(folder)}


def _entry(path: Path, value: Any) -> None:
    """One more in a JSON object of schema ids."""
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**found, str(TEAM_ID): value}), encoding="utf-8")
