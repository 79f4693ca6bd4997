"""Reads the database of the original service, which ran on Bun, as a source for an import.

Only `sources.py` knows of this package. It reads SQLite itself, because that file is nobody's but the original's:
`ccm/db` is about the service's own database.
"""
