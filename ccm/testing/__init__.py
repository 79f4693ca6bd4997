"""Stand-ins that the tests and the demo share."""
