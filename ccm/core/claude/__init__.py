"""One Claude Code process: its options, its input, its messages and its end.

`Execution.run` starts the process, records each message that it writes, and returns the run's `Outcome`. It is called
in a thread of its own and owns that thread's event loop. Other threads use `send` and `stop`.

Guarantees:

- Every run ends: when Claude Code has given a result and is idle, or through a stop, the time limit or the exit of the
  process. `Termination` closes the input of a run that is over. A run that must stop is interrupted, then terminated,
  then killed; each step has a time limit. While storage is slow, a run that is over may take longer to end.
- No process of the run remains, except background processes that the agent left behind in a run that ended by itself.
  Every process inherits a mark (CCM_RUN_ID) by which it is found; the `Reaper` ends them if the service is killed.
- Messages are recorded unchanged and in order, except those that only this service asked for (session states and the
  lifecycle of follow-ups). While storage is slow, Claude Code waits.

Failures: every failure of the process becomes an `Outcome` with an error code. A fault in one of the run's own tasks
ends the run as `EXECUTION_ERROR`.
"""
