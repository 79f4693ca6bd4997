"""Runs: accepted, carried out, ended."""
