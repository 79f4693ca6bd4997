"""Webhooks: deliveries of events to HTTP receivers, signed as https://www.standardwebhooks.com says.

A delivery is `pending` until it is `delivered` (2xx), `failed` (all attempts of the schedule failed) or `disabled`
(410, or its address is no longer configured or allowed).

- At least once: `Outbox` stores a delivery in the transaction of the state that it reports. An attempt's outcome is
  stored after the attempt, so after a crash in between the delivery is sent again, with the same `webhook-id`.
- In order per run and target: only the oldest pending delivery has a `nextAttemptAt`. The transaction that ends it sets
  that of the next one.
- Failed attempts are repeated after the pauses of `retry.SCHEDULE`. A 410 disables the target: the run's own address
  for this run, or the service's address until the next start.
- While the database cannot be written, an outcome waits to be stored, and its delivery is not resent. Other failures
  of the service are reported to `Problems`, and the work is retried after a delay.
"""
