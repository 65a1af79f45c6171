"""One PostgreSQL server: connections, the shape of a table, slices and indexes."""
