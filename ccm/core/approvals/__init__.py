"""Claude Code's permission requests and their answers."""
