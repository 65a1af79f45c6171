"""The ledger on a server that is none of the application's: Alembic's revisions, run by the program itself."""

import argparse
from pathlib import Path

from alembic import command
from alembic.config import Config

from pipeline.endpoints import Endpoint
from pipeline.errors import RefusedError
from pipeline.migration import engine_on
from pipeline.postgres.database import Session
from pipeline.settings import Settings

# In a checkout they lie beside the package, in what was installed from a wheel inside of it.
_PLACES = (Path(__file__).parent.parent, Path(__file__).parent / "revisions")


def _config_file() -> Path | None:
    return next((place / "alembic.ini" for place in _PLACES if (place / "alembic" / "versions").is_dir()), None)


def has_revisions() -> bool:
    """Return whether the revisions that make a ledger are at hand."""
    return _config_file() is not None


def install_ledger(target: Endpoint, settings: Settings) -> None:
    """Bring the ledger on ``target`` to the newest revision; the table that is there stays as it is.

    Raises RefusedError where the revisions are not at hand, or a right is missing.
    """
    if (file := _config_file()) is None:
        raise RefusedError(
            "the revisions that make a ledger are not installed beside this program",
            "point DB_* at the target, and run in the checkout: alembic -x adopt=yes upgrade head",
        )
    config = Config(str(file), cmd_opts=argparse.Namespace(x=["adopt=yes"]))
    with Session(target, "alembic") as session, engine_on(session).connect() as connection:
        config.attributes["connection"] = connection
        config.attributes["settings"] = settings
        command.upgrade(config, "head")
