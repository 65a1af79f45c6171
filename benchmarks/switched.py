"""How long no side takes writes in a cutover, by the engine's own steps; and how long the way back takes."""

import os
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

from changed_pass import change
from pipeline.cutover import forward, switching
from pipeline.cutover.back import rollback
from pipeline.cutover.engine import open_work, run_of, take_step
from pipeline.cutover.finalize import finalize
from pipeline.cutover.work import Deed, Tools, Work, begin
from pipeline.endpoints import Endpoint
from pipeline.events import Event
from pipeline.install import has_revisions, install_ledger
from pipeline.move.lease import Lease
from pipeline.options import DEFAULT_DEADLINE_SECONDS, CutoverOptions
from pipeline.postgres.crew import Crew
from pipeline.postgres.database import Session, clock
from pipeline.settings import DEFAULTS, Route, Settings

STAMP = "bench"


class NoSearch:
    """The application's search, which no step here asks for."""

    def by_vector(
        self, endpoint: Endpoint, settings: Settings, vector: Sequence[float], k: int
    ) -> list[tuple[str, float]]:
        """Raise NotImplementedError."""
        raise NotImplementedError

    def by_text(self, endpoint: Endpoint, settings: Settings, text: str, k: int) -> list[tuple[str, float]]:
        """Raise NotImplementedError."""
        raise NotImplementedError


TOOLS = Tools(search=NoSearch(), install_ledger=install_ledger, has_revisions=has_revisions)


def fence_held(route: Route, settings: Settings, few: int) -> dict[str, float]:
    """Cut over with ``few`` rows changed just before the fence, and go back; both tables are equal before and after.

    Returns the seconds for which no side took writes, and those of the whole way back.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, ".env")
        file.write_text("".join(f"{name}='{os.environ[name]}'\n" for name in DEFAULTS if name in os.environ))
        options = CutoverOptions(env_files=(file,), skip_backup=True)
        with Crew() as crew:
            lease = Lease(crew, route.target, crew.call(run_of, crew, route), DEFAULT_DEADLINE_SECONDS)
            made = crew.call(begin, crew, route, lease, "cutover", {"stamp": STAMP})
            work = open_work(crew, route, settings, options, TOOLS, made, lease)
            finish(take_step(work, "catchup", forward.catch_up))
            with Session(route.source, "bench") as source:
                change(source, settings.table, few)
            steps: tuple[tuple[str, Callable[[Work], Deed]], ...] = (
                ("fence", forward.fence),
                ("prove", forward.prove),
                ("switch", switching.switch),
            )
            for name, deed in steps:
                finish(take_step(work, name, deed))
            held = float(work.evidence("switch")["fence_seconds"])
            lease.release()
        started = clock()
        finish(rollback(route, settings, options, TOOLS))
        back = clock() - started
        # What else is measured writes to main by itself.
        finish(finalize(route, settings, options, TOOLS))
        return {"fence_seconds": held, "rollback_seconds": back}


def finish(events: Generator[Event, None, None]) -> None:
    """Let an engine function come to its end."""
    with closing(events) as running:
        for _ in running:
            pass
