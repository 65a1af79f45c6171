"""What was measured, as tables for people."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from limits import STATED_LATENCY_MS, STATED_ROWS, Limit, in_words, limits
from outcome import Outcome, Section
from pipeline.show.figures import size
from pipeline.wording import counted
from proving import ProofCost
from servers import RELEASES
from studies import LedgerCost, MemoryCase, PassCost, ResumeCost

# Wide enough for the tables where stdout is a file or a pipe.
PLAIN_WIDTH = 130
# A machine of which others use more than this share says little.
QUIET_LOAD_PER_CORE = 0.25


def print_report(outcome: Outcome) -> None:
    """Write the tables to stdout, what all of it comes to as the last."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)

    def section(title: str, table: Table | None, *lines: str) -> None:
        console.print(f"[bold]{title}[/bold]")
        if table is not None:
            console.print(table)
        for line in lines:
            console.print(line)
        console.print()

    for one in outcome.sections:
        section(one.scene.title, _speed_table(one, outcome), *_distance_lines(one))
    if outcome.memory is not None:
        section("Memory of a copy, by the table", _memory_table(outcome.memory))
    if outcome.ledger is not None:
        section("Slices, with one worker", _ledger_table(outcome.ledger), _ledger_line(outcome.ledger))
    if outcome.resume is not None:
        section("Resume", None, *_resume_lines(outcome.resume))
    if outcome.changes is not None:
        section("Changes during the copy", None, *_pass_lines(outcome.changes))
    if outcome.proofs is not None:
        section("Verify and sync", None, *_proof_lines(outcome.proofs))
    section("The run", None, *_facts(outcome))
    if found := limits(outcome):
        section("Limits", _limit_table(found), *_stated_lines(outcome))


def _new_table(first: str, *figures: str, what: str) -> Table:
    """Return a table of a name, figures, and words about it."""
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0))
    table.add_column(first)
    for column in figures:
        table.add_column(column, justify="right")
    table.add_column(what)
    return table


def _speed_table(section: Section, outcome: Outcome) -> Table:
    table = _new_table("contender", "seconds", "least", "most", "MB/s", "ratio", "CPU s", "memory", what="what")
    for result in section.results:
        base = result.base(outcome.results)
        wall = [one.seconds for one in result.turns]
        table.add_row(
            result.contender.name,
            *(f"{seconds:.2f}" for seconds in (result.seconds, min(wall), max(wall))),
            f"{outcome.data.stream_bytes / result.seconds / 1e6:.0f}",
            "-" if base is None else f"{result.seconds / base.seconds:.2f} x {base.contender.name}",
            f"{result.cpu_seconds:.2f}",
            size(result.peak_bytes),
            result.contender.what,
        )
    return table


def _distance_lines(section: Section) -> list[str]:
    if (found := section.distance) is None:
        return []
    return [
        f"A SELECT takes {found.select_ms:.1f} ms; one connection passes {size(found.bytes_per_second)}/s of the"
        " proxy alone."
    ]


def _memory_table(cases: Sequence[MemoryCase]) -> Table:
    table = _new_table("table", "rows", "as COPY", "peak", what="ratio")
    least = min(case.peak_bytes for case in cases)
    for case in cases:
        ratio = f"{case.peak_bytes / least:.2f}"
        table.add_row(case.what, f"{case.rows:,}", size(case.stream_bytes), size(case.peak_bytes), ratio)
    return table


def _ledger_table(cost: LedgerCost) -> Table:
    table = _new_table("slices", "count", "seconds", "ratio", what="what")
    largest = cost.results[0]
    for one in cost.results:
        ratio = f"{one.seconds / largest.seconds:.2f}"
        table.add_row(one.contender.name, str(one.slices), f"{one.seconds:.2f}", ratio, one.contender.what)
    return table


def _ledger_line(cost: LedgerCost) -> str:
    return (
        f"A slice costs {cost.second_per_slice * 1000:.1f} ms (finest against largest), those of the default"
        f" {cost.share:.2%} of its time."
    )


def _resume_lines(cost: ResumeCost) -> list[str]:
    return [
        f"{counted(cost.workers, 'worker')}, {counted(cost.slices, 'slice')} of up to"
        f" {counted(cost.slice_rows, 'row')}: killed before the commit of slice {cost.killed_in_slice} and run again,",
        f"the copy sent {counted(cost.repeated_rows, 'row')} twice, {cost.repeated_slices:.2f} of a slice.",
    ]


def _pass_lines(cost: PassCost) -> list[str]:
    return [
        f"By the copy's own events, {cost.copy_seconds:.2f} s in all: {cost.before_seconds:.2f} s of checks and plan,"
        f" then {cost.load_seconds:.2f} s of load.",
        f"The pass that brings {counted(cost.changed_rows, 'changed row')} of {cost.rows:,} took"
        f" {cost.pass_seconds:.2f} s more, one that finds none {cost.quiet_pass_seconds:.2f} s.",
    ]


def _proof_lines(cost: ProofCost) -> list[str]:
    return [
        f"A copy took {cost.copy_seconds:.2f} s, a verify of its {cost.rows:,} rows {cost.verify_seconds:.2f} s, one"
        f" where every row differs {cost.different_seconds:.2f} s; at most {size(cost.peak_bytes)}.",
        f"By the engine: comparing all rows {cost.deep_compare_seconds:.2f} s; {cost.few:,} changed on legacy, a sync"
        f" {cost.sync_seconds:.2f} s,",
        f"verify --incremental {cost.incremental_seconds:.2f} s, sync --deep {cost.deep_sync_seconds:.2f} s.",
        f"A sync of {cost.many:,} changed rows {cost.many_seconds:.2f} s, the raw upsert of as many"
        f" {cost.upsert_seconds:.2f} s.",
        f"In a cutover with {cost.few:,} late changes no side took writes for {cost.fence_seconds:.2f} s; the whole way"
        f" back took {cost.rollback_seconds:.2f} s.",
    ]


def _facts(outcome: Outcome) -> list[str]:
    data, machine = outcome.data, outcome.machine
    facts = [
        f"{counted(data.content.rows, 'row')}, {size(data.stream_bytes)} as binary COPY,"
        f" {size(data.table_bytes)} on disk; {counted(outcome.rounds, 'round')}, medians; PostgreSQL"
        f" {' to '.join(RELEASES)}, fsync on."
    ]
    if checkpoints := [turn.checkpoints for one in outcome.results for turn in one.turns]:
        facts += [
            "Count and digest of all rows were equal after each contender's last round.",
            f"Checkpoints on main during a turn, by volume: {min(checkpoints)} to {max(checkpoints)}.",
        ]
    if outcome.missing_tools:
        facts.append(f"Not installed, so not in it: {', '.join(outcome.missing_tools)}.")
    load, cores = machine["load_average_1_min"], machine["cores"]
    assert isinstance(load, float)
    assert isinstance(cores, int)
    facts.append(f"{cores} cores, kernel {machine['kernel']}, load average before {load:.1f}.")
    if load > QUIET_LOAD_PER_CORE * cores:
        facts.append("[bold]Others were at work on this machine: the figures say little.[/bold]")
    return facts


def _limit_table(found: Sequence[Limit]) -> Table:
    table = _new_table("what", "found", "limit", what="")
    for one in found:
        bound = f"at {'least' if one.least else 'most'} {in_words(one.limit, one.unit)}"
        table.add_row(one.what, in_words(one.found, one.unit), bound, "" if one.is_kept else "beyond")
    return table


def _stated_lines(outcome: Outcome) -> list[str]:
    if outcome.data.content.rows == STATED_ROWS:
        return []
    return [
        f"The limits of time are stated for {STATED_ROWS:,} rows (at a distance: {STATED_LATENCY_MS} ms), beside"
        " which starting a program is little."
    ]
