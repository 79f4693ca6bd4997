"""The drivers: dataset with SQLAlchemy, sqlite3 and psycopg, each in a file of its own."""
