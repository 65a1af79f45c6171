"""Move embeddings between PostgreSQL hosts, and prove that search answers the same."""

__version__ = "0.1.0"
