"""Reads the database of the original service, which ran on Bun, as a source for an import.

Only `sources.py` imports this package. It reads SQLite directly, because `ccm/db` is for the service's own database.
"""
