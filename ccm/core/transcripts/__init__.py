"""Claude Code's transcripts: copied from its files into the database, and restored from there.

A run can be continued while its transcript is on this host or complete in the database (`transcriptStored`). A stored
transcript never loses entries, and an existing file of Claude Code's is never changed: one that lacks stored entries is
renamed and replaced. If a transcript cannot be stored, the run itself ends normally.
"""
