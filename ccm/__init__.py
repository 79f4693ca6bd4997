"""CC Manager: a thin HTTP service over the Claude Agent SDK."""

__version__ = "0.9.0"
