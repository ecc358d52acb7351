"""docs/latency.md describes every field of a result."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from bench import results

DOC = (Path(__file__).resolve().parents[2] / "docs" / "latency.md").read_text()
SCHEMA = DOC[DOC.index("## The file") :]


def test_every_field_is_described_and_nothing_else() -> None:
    structs = [each for each in vars(results).values() if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    fields = {field for struct in structs for field in struct.__struct_fields__}
    assert len(fields) > 60
    told = set(re.findall(r"`(\w+)`", SCHEMA))
    assert fields - told == set()
    assert told - fields == set()


def test_the_number_of_the_schema_and_of_samples() -> None:
    assert f"`schema` {results.SCHEMA};" in SCHEMA
    assert f"more than {results.STORED}" in SCHEMA
