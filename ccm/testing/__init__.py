"""The stand-in for the Messages API, and the service as a process: shared by the tests and `flask demo`."""
