"""Reports only read the store: rows, then the rows as a table in several formats."""
