"""The training tables: scanned, joined, made into lessons by Ray."""
