"""The core layer: what the service does, without Flask and without SQL.

`service` wires the parts together. Imports go one way, from top to bottom:

- `runs` (accept, start and end runs) and `archive` (export, import, prune)
- `approvals`, `transcripts`
- `claude` (one Claude Code process), `policy` (what the settings allow), `webhooks`
- `streams`, `queries` and `lineage` (reads)
- `storage` (writes and notifications), `worker_pool`, `problems`
"""
