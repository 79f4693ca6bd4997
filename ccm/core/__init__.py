"""The core layer: what the service does, without Flask and without SQL.

Only `archive/bun`, which reads the database of another program, has SQL of its own.

`service` wires the parts together. Imports go one way, from top to bottom and within a line from left to right
(tests/test_floors.py has the exact rules):

- `runs` (accept, start and end runs) and `archive` (export, import, prune)
- `approvals`, `transcripts`
- `claude` (one Claude Code process), `policy` (what the settings allow), `webhooks`
- `streams`, `queries` and `lineage` (reads)
- `storage` (writes and notifications), `worker_pool`, `problems`, `run_log`
"""
