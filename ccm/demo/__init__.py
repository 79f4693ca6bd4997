"""A demonstration without a login: a stand-in for the Messages API, and a tour."""
