"""Code shared by all routes.

A request passes `proxy` (forwarded headers), `admission` and `route` (validation by `query` and `bodies`) before
its view runs. The view answers through `responses`, `pagination`, `message_lists` or `sse`. Requests that are held open
take a slot of `request_limiter`.
"""
