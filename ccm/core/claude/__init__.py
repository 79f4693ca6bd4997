"""One Claude Code process: where its program and its files are, how it is started, fed, read and ended."""
