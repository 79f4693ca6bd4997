"""Connections, transactions, errors, locks and migrations.

dataset with SQLAlchemy (`connection_pool`), sqlite3 (`sqlite`, `sqlite_file`) and psycopg (`postgresql`) have a file
each. `Database.transaction` is the only way to the database. It always returns its connection, and it turns the
drivers' exceptions into those of `ccm.errors`.
"""
