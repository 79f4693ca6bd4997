"""Connections, transactions, errors, locks and migrations.

`connection_pool` uses dataset with SQLAlchemy; `sqlite` and `sqlite_file` have what is particular to SQLite,
`postgresql` what is particular to PostgreSQL. `Database.transaction` is the only way to the database. It always returns
its connection, and it turns the drivers' exceptions into those of `ccm.errors`.
"""
