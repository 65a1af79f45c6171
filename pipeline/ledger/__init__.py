"""The ledger: runs, slices, deferred indexes and verdicts, in schema ``pipeline`` on the target.

Alembic makes the tables and nothing else does. Every function works inside the caller's transaction,
so that record and work commit together.
"""
