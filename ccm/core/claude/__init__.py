"""One Claude Code process: its options, its input, its messages and its end."""
