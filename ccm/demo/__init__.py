"""The tour of `flask demo`: real Claude Code against a stand-in for the Messages API, without a login."""
