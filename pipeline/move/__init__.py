"""Rows on their way: the relay of one slice, and the copy of a table."""
