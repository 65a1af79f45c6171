"""The study of proofs: comparing all rows, syncing and verifying what was touched, memory where every row differs."""

import json
import statistics
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from psycopg2 import sql

from contenders import copy_step
from measure import BenchError, Command, Step, measure
from pipeline.errors import EXIT_DIFFERENCES
from pipeline.options import DEFAULT_WORKERS
from testbed import Testbed
from turns import Turns

PROOFS = Path(__file__).with_name("proofs.py")
VERIFY_ROWS = (sys.executable, "-m", "pipeline", "verify", "--check", "rows")
# Of the table's rows: those that a quiet day changes, and those that a rate can be told by.
FEW_SHARE, MANY_SHARE = 1000, 10
# Updated, deleted and new rows take at least one of five.
LEAST_CHANGES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofCost:
    """Medians. ``copy_seconds`` and ``verify_seconds`` are whole processes; the others, by the engine.

    ``few`` and ``many`` rows were changed on legacy before a sync. ``upsert_seconds`` is a raw upsert of as
    many rows; ``fence_seconds`` is for how long no side took writes in a cutover with ``few`` late changes, and
    ``rollback_seconds`` for the whole way back from it. ``peak_bytes`` is the highest of a verify of all rows,
    of equal tables and where every row differs.
    """

    rows: int
    few: int
    many: int
    copy_seconds: float
    verify_seconds: float
    deep_compare_seconds: float
    sync_seconds: float
    incremental_seconds: float
    deep_sync_seconds: float
    many_seconds: float
    upsert_seconds: float
    fence_seconds: float
    rollback_seconds: float
    peak_bytes: int
    different_seconds: float

    @property
    def rows_per_second(self) -> float:
        """Return how many changed rows a sync brings in a second."""
        return self.many / self.many_seconds


def proofs(bed: Testbed, turns: Turns) -> ProofCost:
    """Copy, compare, change and sync, in every round; at the end of each every row of main is made to differ.

    Legacy is not what it was afterwards.
    """
    few = max(LEAST_CHANGES, bed.content.rows // FEW_SHARE)
    many = max(LEAST_CHANGES, bed.content.rows // MANY_SHARE)
    file = bed.folder / "proofs.json"
    rounds: list[dict[str, float]] = []
    peak = 0
    for number in range(turns.rounds):
        bed.reset(with_index=False)
        copied = _run(bed, copy_step(DEFAULT_WORKERS))
        verified = _run(bed, ((VERIFY_ROWS,),))
        _run(bed, (((sys.executable, str(PROOFS), str(file), str(few), str(many)),),))
        figures: dict[str, float] = json.loads(file.read_text())
        _differ(bed)
        different = _run(bed, ((_failing(VERIFY_ROWS, EXIT_DIFFERENCES),),))
        peak = max(peak, verified[1], different[1])
        figures |= {
            "copy_seconds": copied[0],
            "verify_seconds": verified[0],
            "different_seconds": different[0],
        }
        turns.tell(f"round {number + 1} of {turns.rounds}  {'proofs':<14} {sum(figures.values()):8.2f} s")
        rounds.append(figures)
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return ProofCost(rows=bed.content.rows, few=few, many=many, peak_bytes=peak, **medians)


def _run(bed: Testbed, step: Step) -> tuple[float, int]:
    done = measure((step,), bed.environment, bed.folder)
    return done.seconds, done.peak_bytes


def _failing(command: Command, code: int) -> Command:
    """Return the command, whose success is that exit code."""
    return ("/bin/sh", "-c", f'"$@"; test $? -eq {code}', "sh", *command)


def _differ(bed: Testbed) -> None:
    """Make every row of main differ from legacy's."""
    content = sql.Identifier(bed.mapping.content)
    with closing(bed.connect(bed.main)) as connection, connection.cursor() as cursor:
        cursor.execute(sql.SQL("UPDATE {} SET {} = {} || '!'").format(bed.table, content, content))
        if not cursor.rowcount:
            raise BenchError("main has no row that could differ")
