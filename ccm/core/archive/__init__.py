"""Export, import and deletion of recorded history, for `flask export`, `flask import` and `flask prune`.

- An export is JSON Lines: each session after the one it was forked from, each run with its messages, approvals and
  transcripts. All of it is read in one transaction, so it is a snapshot also while a service is running.
- An import reads a source (an export, or the database of the original service) as `ArchivedRun`s, and stores each run
  in a transaction of its own. After a failure the runs before it stay, complete. Runs that are in the database already
  are skipped, so an import can be repeated. A run that conflicts with the database is reported and left out.
- A prune deletes whole trees of sessions: first Claude Code's own files, then the rows. After a failure it can be
  repeated, because the rows say where the files are.
"""
