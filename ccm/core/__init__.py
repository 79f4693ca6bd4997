"""The core floor: what the service does. No Flask, no SQL."""
