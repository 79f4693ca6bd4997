"""The configuration: environment variables, their parsers, and the files that they name."""
