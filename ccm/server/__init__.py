"""The production server: waitress behind guarantees that a long-running service needs.

Waitress 3 by default:

- listens on all interfaces, and dies with select() on a descriptor above 1023; every Claude Code process takes some;
- drops idle connections only: a client may send a request byte by byte, and one that reads no answer keeps a thread;
- closes its listening socket when setting up one connection fails, and polls at full load when descriptors run out;
- drops a connection without an answer when the disk for temporary files is full;
- buffers up to 16 MiB for each client that reads slowly, and reports its own errors in plain text;
- cuts off every request at SIGTERM.

This package guarantees:

- Slow clients hold no thread while they send, and are disconnected after bounded times (connections.py).
- The listening socket survives failures of single connections, and a shortage of descriptors costs no CPU. If the
  listening socket itself breaks, the service stops with exit code 1, so that its supervisor restarts it (server.py).
- While the disk is full, large requests get a 503 and large answers are buffered in memory.
- A first SIGTERM or SIGINT ends the runs, finishes the answers in flight and closes the database; a second one exits.
- A second instance cannot take the address or the Unix socket, nor delete the socket of the first one (listener.py).
"""
