"""What was measured, as plain values for JSON."""

import os
import platform
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version

from limits import STATED_LATENCY_MS, STATED_ROWS, limits
from outcome import Data, Outcome, Section
from pipeline import __version__
from pipeline.postgres.tables import read_extension
from servers import SERVER_SETTINGS
from testbed import Testbed
from turns import Result

SCHEMA_VERSION = 3


def document(outcome: Outcome) -> dict[str, object]:
    """Return the outcome as one JSON document. A study that was not asked for has no member."""
    data = outcome.data
    found: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": outcome.machine,
        "data": {
            "rows": data.content.rows,
            "digest": data.content.digest,
            "dimensions": data.dimensions,
            "stream_bytes": data.stream_bytes,
            "table_bytes": data.table_bytes,
        },
        "server_settings": SERVER_SETTINGS,
        "rounds": outcome.rounds,
        "missing_tools": outcome.missing_tools,
        "limits_stated_for": {"rows": STATED_ROWS, "latency_ms": STATED_LATENCY_MS},
        "limits": [
            {
                "what": one.what,
                "unit": one.unit,
                "found": one.found,
                "at_least" if one.least else "at_most": one.limit,
                "kept": one.is_kept,
            }
            for one in limits(outcome)
        ],
        "scenes": [_scene(section, outcome) for section in outcome.sections],
    }
    if outcome.memory is not None:
        found["memory"] = [asdict(case) for case in outcome.memory]
    if (ledger := outcome.ledger) is not None:
        found["ledger"] = {
            "second_per_slice": ledger.second_per_slice,
            "share": ledger.share,
            "copies": [
                {"name": one.contender.name, "slices": one.slices, "median_seconds": one.seconds}
                for one in ledger.results
            ],
        }
    if (resume := outcome.resume) is not None:
        found["resume"] = asdict(resume) | {"repeated_slices": resume.repeated_slices}
    if outcome.changes is not None:
        found["changes"] = asdict(outcome.changes)
    if (proofs := outcome.proofs) is not None:
        found["proofs"] = asdict(proofs) | {"rows_per_second": proofs.rows_per_second}
    return found


def _scene(section: Section, outcome: Outcome) -> dict[str, object]:
    return {
        "legacy": "cold" if section.scene.cold else "warm",
        "latency_ms": section.scene.latency_ms,
        "distance": None if section.distance is None else asdict(section.distance),
        "contenders": [_contender(outcome.data, result, outcome.results) for result in section.results],
    }


def _contender(data: Data, result: Result, results: Sequence[Result]) -> dict[str, object]:
    base = result.base(results)
    return {
        "name": result.contender.name,
        "what": result.contender.what,
        "kind": result.contender.kind,
        "median_seconds": result.seconds,
        "median_cpu_seconds": result.cpu_seconds,
        "peak_bytes": result.peak_bytes,
        "bytes_per_second": data.stream_bytes / result.seconds,
        "ratio": None if base is None else result.seconds / base.seconds,
        "ratio_to": None if base is None else base.contender.name,
        "slices": result.slices,
        "left": asdict(result.left),
        "equal": result.left == data.content,
        "rounds": [asdict(one) for one in result.turns],
    }


def read_machine(bed: Testbed, load_before: float) -> dict[str, object]:
    """Return what the figures depend on, the load by others before the benchmark included; not the machine's name."""
    servers = {}
    for name, server in (("legacy", bed.legacy), ("main", bed.main)):
        with closing(bed.connect(server)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_catalog.current_setting('server_version')")
            ((release,),) = cursor.fetchall()
            extension = read_extension(cursor)
            servers[name] = {"postgresql": release, "pgvector": extension.text if extension else None}
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_1_min": load_before,
        "python": platform.python_version(),
        "psycopg2": version("psycopg2-binary"),
        "pipeline": __version__,
        "servers": servers,
    }
