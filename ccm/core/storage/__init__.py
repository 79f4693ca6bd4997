"""Writing to the database, and everything that follows a commit.

One writer thread holds the only connection that writes. It batches the queued items into one transaction and commits.
Then it runs each control write's `on_commit`, completes its future, and notifies the subscribers of new messages, who
read them from the database.

An item is a message of a run, or a control write (`WriteTask`): any other work in a transaction. A control write is
pending, in progress, done or dropped.

Guarantees: items are stored in the order in which they were queued. A control write that fails rolls back alone. One
that is reported as not stored is never stored later. After a commit whose outcome is unknown the writer looks for its
messages before it inserts them again.

Failures: while the database is down the writer retries its batch, and `/health` shows the reason. Memory stays bounded
because runs wait for room in the message budget. If the database refuses a single message, only the run of that
message fails. `StorageHealth` finds a fault of an idle service by writing a heartbeat.
"""
