"""Every difference between two tables: by comparing all of both, or only what was touched since they were equal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from psycopg2 import sql

from pipeline.check.changes import CloseLook, Look, changed_keys, look, look_closely
from pipeline.check.compare import compare
from pipeline.check.differences import BATCH_KEYS, Difference, differences_of, open_buckets
from pipeline.check.digests import BucketMap
from pipeline.check.onesided import one_sided_keys
from pipeline.check.pair import Pair
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import STREAM_ROWS, Session, clock
from pipeline.postgres.tables import Table
from pipeline.postgres.values import Key
from pipeline.settings import Route

Take = Callable[[list[Difference]], None]
Sessions = tuple[Session, Session]
# So many keys are remembered, some 10 MB: beyond, what differs was not changed by the writers of a few minutes.
REMEMBERED_KEYS = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """Where both tables were known to be equal: how they stood there, and which of the target's rows are ours.

    ``own`` is a condition on the target's rows ``r``: of those that were brought since, and need not be looked
    at. Without ``exact`` the target had further rows, of keys that the source has not.
    """

    source: Look
    target: Look
    own: sql.Composable | None = None
    exact: bool = True

    def still(self, looks: tuple[Look, Look]) -> bool:
        """Return whether nothing was written on either side, by looks that were taken since."""
        return not (looks[0].since(self.source) or looks[1].since(self.target))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search for differences speaks of: how both tables stood before the last look at each row.

    ``source`` and ``target`` are the sums of all rows, where all were read; ``touched`` is how many keys were
    looked at by themselves, because somebody wrote them.
    """

    horizons: tuple[Look, Look]
    source: BucketMap | None = None
    target: BucketMap | None = None
    touched: int = 0


def can_be_touched(pair: Pair) -> bool:
    """Return whether both sides tell what was written since a horizon: a view does not."""
    return bool(pair.source.heaps and pair.target.heaps)


def still_holds(pair: Pair, source: Mapping[str, Any], target: Mapping[str, Any]) -> bool:
    """Return whether both servers still have the history that an earlier pass, by its looks as JSON, speaks of."""
    here, there = Look.from_json(source), Look.from_json(target)
    return here.holds(pair.source, pair.horizons[0]) and there.holds(pair.target, pair.horizons[1])


def find_all(
    crew: Crew,
    route: Route,
    pair: Pair,
    take: Take,
    *,
    workers: int,
    settle: float,
    restart: bool,
    kept: bool,
    own: sql.Composable | None = None,
) -> Found:
    """Compare every row of both sides, then what was written meanwhile; hand every difference to ``take``.

    While somebody writes, a difference counts if it is still there after ``settle`` seconds. Memory is
    bounded. ``own`` as in a base, the other arguments as for ``compare``. Blocks. Raises PipelineError.
    """
    here, there = compare(crew, route, pair, workers=workers, restart=restart, kept=kept)
    ends = (route.source, "verify"), (route.target, "verify")
    seen: set[Key] = set()

    def remember(found: list[Difference]) -> None:
        if len(seen) < REMEMBERED_KEYS:
            seen.update(one.key for one in found)
        take(found)

    buckets = here.sums.differing(there.sums)
    if buckets:
        with crew.together(*ends, *ends) as (source, target, *others):
            opened = clock()
            found = open_buckets((source, pair.source), (target, pair.target), pair.columns, buckets)
            settled = _Settled(crew, pair, (here.horizon, there.horizon), (others[0], others[1]), opened + settle)
            for batch in _batches(found):
                crew.check()
                if staying := settled.staying(batch):
                    remember(staying)
    if not can_be_touched(pair) or len(seen) >= REMEMBERED_KEYS:
        return Found(horizons=(here.horizon, there.horizon), source=here.sums, target=there.sums)

    def take_new(found: list[Difference]) -> None:
        if new := [one for one in found if one.key not in seen]:
            take(new)

    base = Base(source=here.horizon, target=there.horizon, own=own)
    touched = find_touched(crew, route, pair, base, take_new, settle=settle)
    return replace(touched, source=here.sums, target=there.sums)


class _Settled:
    """Differences that stay: looked up again once the settle time is over, unless nobody writes."""

    def __init__(self, crew: Crew, pair: Pair, looks: tuple[Look, Look] | None, sessions: Sessions, at: float) -> None:
        """Take how both tables stood when nobody had written yet (None: somebody has), and when it is late enough."""
        self._crew = crew
        self._pair = pair
        self._looks = looks
        self._sessions = sessions
        self._at = at
        self._quiet: bool | None = None if looks is not None else False

    def staying(self, batch: list[Difference]) -> list[Difference]:
        """Return those of a batch that are still there, as they are now."""
        if self._quiet is None and self._looks is not None:
            now = _look_again(self._crew, self._pair, self._sessions, self._looks)
            self._quiet = not any(one.since(before) for one, before in zip(now, self._looks, strict=True))
        if self._quiet:
            return batch
        self._crew.pause(max(0.0, self._at - clock()))
        return _differences_now(self._crew, self._pair, self._sessions, [one.key for one in batch])


def _look_again(crew: Crew, pair: Pair, sessions: Sessions, since: tuple[Look, Look]) -> tuple[Look, Look]:
    return crew.beside(
        partial(look, sessions[0], pair.source, since[0].horizon),
        partial(look, sessions[1], pair.target, since[1].horizon),
    )


def _differences_now(crew: Crew, pair: Pair, sessions: Sessions, keys: Sequence[Key]) -> list[Difference]:
    source, target = sessions
    return differences_of(crew, (source, pair.source), (target, pair.target), pair.columns, keys)


def _batches(found: Iterator[Difference]) -> Iterator[list[Difference]]:
    while batch := list(islice(found, BATCH_KEYS)):
        yield batch


def find_touched(crew: Crew, route: Route, pair: Pair, base: Base, take: Take, *, settle: float) -> Found:
    """Compare the rows that were touched on either side since both were equal; hand every difference to ``take``.

    Deleted rows are found by the sums of the keys. Asks for ``can_be_touched``. Otherwise as ``find_all``.
    """
    ends = (route.source, "verify"), (route.target, "verify")
    with crew.together(*ends, *ends) as (source, target, *others):
        checkers = others[0], others[1]
        began, count = clock(), 0
        looks, touched = touched_keys(crew, pair, (source, target), base)
        # What differs here was written since the base, perhaps a moment ago: it may be on its way.
        settled = _Settled(crew, pair, None, checkers, began + settle)
        for keys in touched:
            crew.check()
            count += len(keys)
            if (found := _differences_now(crew, pair, checkers, keys)) and (staying := settled.staying(found)):
                take(staying)
    return Found(horizons=looks, touched=count)


def touched_keys(
    crew: Crew, pair: Pair, sessions: Sessions, base: Base, changes_done: Callable[[], object] = lambda: None
) -> tuple[tuple[Look, Look], Iterator[list[Key]]]:
    """Look at both tables; return how they stand, and, in batches, the keys of all rows that may differ.

    These are the rows that were changed on a side since the base, then those that one side alone has. Of
    very many keys one may come more than once: then ``changes_done`` is called in between.
    """
    here, there = crew.beside(
        partial(look_closely, sessions[0], pair.source, base.source.horizon),
        partial(look_closely, sessions[1], pair.target, base.target.horizon, base.own),
    )
    looks = here.look, there.look
    if base.exact and base.still(looks):
        return looks, iter(())
    return looks, _each_once(_touched(pair, sessions, base, (here, there), changes_done))


def _each_once(batches: Iterator[Sequence[Key]]) -> Iterator[list[Key]]:
    seen: set[Key] = set()
    for keys in batches:
        if new := [key for key in dict.fromkeys(keys) if key not in seen]:
            yield new
        if len(seen) < REMEMBERED_KEYS:
            seen.update(new)


def _touched(
    pair: Pair,
    sessions: Sessions,
    base: Base,
    looks: tuple[CloseLook, CloseLook],
    changes_done: Callable[[], object],
) -> Iterator[Sequence[Key]]:
    (source, target), (here, there) = sessions, looks
    if here.look.since(base.source):
        yield from _changed(source, pair.source, base.source, here, None)
    if there.look.since(base.target) and there.look.changed:
        yield from _changed(target, pair.target, base.target, there, base.own)
    if sum(one.look.changed or 0 for one in looks) >= REMEMBERED_KEYS:
        changes_done()
    yield from one_sided_keys((source, pair.source), (target, pair.target), (here.sums, there.sums))


def _changed(
    session: Session, table: Table, before: Look, now: CloseLook, but: sql.Composable | None
) -> Iterator[Sequence[Key]]:
    if now.keys is None:
        yield from changed_keys(session, table, before.horizon, but)
    else:
        yield from (now.keys[first : first + STREAM_ROWS] for first in range(0, len(now.keys), STREAM_ROWS))
