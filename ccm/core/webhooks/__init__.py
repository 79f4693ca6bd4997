"""Telling others what happens to runs, at addresses that they name: https://www.standardwebhooks.com."""
