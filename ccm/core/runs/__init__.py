"""The life of a run: acceptance, start, execution, end.

A run is waiting (its status is `running`, without `startedAt`), then started (`running` with `startedAt`), then ended
(`completed`, `error` or `cancelled`). A cancel ends a waiting run at once and asks a started one to stop.

Guarantees:

- Each decision (accept, start, end) is taken inside the transaction that stores it (`transitions`). Its side effects
  follow the commit (`Runner.perform`).
- A run ends once: the first final status that is stored counts.
- A started run has one owner, a thread of the pool, until its end is stored (`runner`).
- Within a session runs follow one another in the order of their acceptance.

Failures:

- Storage is down: a start gets 503, a started run waits for storage, and its end is retried until it is stored.
- The service dies: at the next start, started runs end as `INTERRUPTED` and are never run again; waiting runs start.
- A side effect fails: `Runner.catch_up` decides again, and ends a run that still cannot begin as `EXECUTION_ERROR`.
- The row of a run is unusable: that run ends in error, if need be by an update that does not read the row; other runs
  and the service are unaffected.
"""
