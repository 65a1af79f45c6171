"""The ledger on a server that is none of the application's: Alembic's revisions, run by the program itself."""

import argparse
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.pool import NullPool

from pipeline.endpoints import Endpoint
from pipeline.errors import RefusedError
from pipeline.postgres.database import Session
from pipeline.settings import Settings


def install_ledger(target: Endpoint, settings: Settings) -> None:
    """Bring the ledger on ``target`` to the newest revision; the table that is there stays as it is.

    Raises RefusedError where the revisions are not at hand, or a right is missing.
    """
    file = Path(__file__).parent.parent / "alembic.ini"
    if not file.is_file():
        raise RefusedError(
            "the revisions that make a ledger are not installed beside this program",
            "point DB_* at the target, and run in the checkout: alembic -x adopt=yes upgrade head",
        )
    config = Config(str(file), cmd_opts=argparse.Namespace(x=["adopt=yes"]))
    with Session(target, "alembic") as session:
        session.connection.autocommit = False
        engine = sa.create_engine(
            "postgresql+psycopg2://",
            creator=lambda: session.connection,
            poolclass=NullPool,
            isolation_level="READ COMMITTED",
            hide_parameters=True,
        )
        with engine.connect() as connection:
            config.attributes["connection"] = connection
            config.attributes["settings"] = settings
            command.upgrade(config, "head")
