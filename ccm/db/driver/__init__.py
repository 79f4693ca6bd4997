"""Connections, transactions, migrations and the two kinds of database."""
