"""The life of a run: acceptance, start, execution, end."""
