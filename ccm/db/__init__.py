"""The database floor: the only one that knows dataset and SQL."""
