"""The database layer: all SQL on our own tables.

Each file owns one family of tables; `archive` and `trees` cut across them for export, import and prune. Their functions
take a `Transaction`, in which everything is committed together; the few that take a `Database` make their own
transactions. `get` raises if a row is missing, `find` returns None.

All functions raise `StorageDown` if the database is temporarily unavailable (locked, full, unreachable) and
`StorageRejected` if it permanently refuses a statement. A transaction that fails is rolled back, and its thread can
begin another one at once.
"""
