"""Claude Code's transcripts: recorded, kept and written back."""
