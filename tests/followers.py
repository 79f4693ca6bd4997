"""Many clients of one stream, for a benchmark: what they receive and when, and what the service spends on it."""

from __future__ import annotations

import hashlib
import os
import re
import selectors
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple

SENT_AT = re.compile(rb'"sentAt": ?([\d.]+)[,}]')


class Followed(NamedTuple):
    """What followers of a run saw.

    Attributes:
        lags: from the CLI's output to the client, of the first message in each received piece (milliseconds).
        cpu: the service's share of a core.
        plain: the p99 of plain requests (milliseconds).
    """

    lags: list[float]
    cpu: float
    plain: float


class Readers(threading.Thread):
    """Clients of one stream, all read by this thread."""

    def __init__(self, url: str, path: str, clients: int) -> None:
        super().__init__(daemon=True)
        host, port = url.removeprefix("http://").split(":")
        self.lags: list[float] = []
        self._selector = selectors.DefaultSelector()
        # What the first client has received, and a digest of what each has.
        self._bodies: list[tuple[bytearray, hashlib._Hash]] = []
        for _ in range(clients):
            connection = socket.create_connection((host, int(port)))
            # In HTTP/1.0 there are no chunks, so that all clients receive the same bytes after the headers.
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            head = b""
            while b"\n\n" not in head:  # the end of the first frame
                head += connection.recv(1)
            assert head.startswith(b"HTTP/1.0 200"), head
            self._bodies.append((bytearray(), hashlib.sha256()))
            self._selector.register(connection, selectors.EVENT_READ, self._bodies[-1])

    def run(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                received = key.fileobj.recv(2**18)
                now = time.time()
                body, digest = key.data
                if not received:
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()
                if key.data is self._bodies[0]:
                    body += received
                digest.update(received)
                if sent := SENT_AT.search(received):
                    self.lags.append((now - float(sent[1])) * 1000)

    def check(self, count: int) -> None:
        """Check that all clients have received the messages 0 to `count` - 1, in order, and the end."""
        if self._bodies:
            ids = re.findall(rb"^id: (.*)$", self._bodies[0][0], re.MULTILINE)
            assert ids == [*(str(index).encode() for index in range(count)), b"end"]
            assert len({digest.digest() for _, digest in self._bodies}) == 1


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
