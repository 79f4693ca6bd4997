"""The writer thread, notifications of commits, and the health of storage."""
