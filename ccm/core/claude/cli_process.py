"""One process of Claude Code with the two pipes to it.

asyncio's own subprocesses belong to the loop that started them, and on Python 3.11 take a thread each to wait for their
exit. This one may be started in one thread and used in the loop of another, and needs no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter
from collections.abc import Mapping, Sequence
from pathlib import Path

from anyio import EndOfStream
from anyio.abc import ByteReceiveStream, ByteSendStream

from ccm import file_limits
from ccm.core.claude.run_events import first

# How often to check for the exit (seconds): where the kernel does not report it, and in case its report is lost.
EXIT_CHECK_INTERVAL = 0.02
EXIT_RECHECK_INTERVAL = 5.0
# How long a killed process may take to end (seconds).
KILL_TIMEOUT = 5.0


class CLIProcess:
    """A started process. `attach` binds it to the running loop; before that only its exit code and signals are used.

    In a process session of its own it does not get the Ctrl-C at the service's terminal.

    Args:
        command: the program and its arguments.
        stderr: the file that takes its stderr.
        open_files: its limit of open files; None for the service's own.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | str,
        environ: Mapping[str, str],
        stderr: Path,
        open_files: int | None,
    ) -> None:
        with stderr.open("wb") as file:
            self._popen = subprocess.Popen(  # noqa: S603  # the options were validated
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                cwd=cwd,
                env=dict(environ),
                start_new_session=True,
                bufsize=0,
            )
        self._transports: list[asyncio.BaseTransport] = []
        try:
            if open_files is not None:
                file_limits.lower(self.pid, open_files)
        except BaseException:
            self.end(0.0)  # nobody else would know of it
            raise

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._popen.poll()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal unless the process has exited."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close_pipes(self) -> None:
        """Close the pipes of a process that no loop uses. Claude Code then exits."""
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None  # noqa: S101  # for mypy
            pipe.close()

    def end(self, seconds: float) -> None:
        """Close the pipes of a process that no loop uses, and wait for its exit. Kill its group after `seconds`."""
        self.close_pipes()
        try:
            self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.pid, signal.SIGKILL)
                self._popen.wait(KILL_TIMEOUT)

    # ---- in the loop that uses it

    async def attach(self) -> tuple[ByteSendStream, ByteReceiveStream]:
        """Return its input and its output, for the running loop. Called once."""
        loop = asyncio.get_running_loop()
        reader = StreamReader()
        output, _ = await loop.connect_read_pipe(lambda: StreamReaderProtocol(reader), self._popen.stdout)
        self._transports.append(output)
        # The protocol of a reader is asyncio's only public one whose flow control a StreamWriter can wait for.
        transport, protocol = await loop.connect_write_pipe(
            lambda: StreamReaderProtocol(StreamReader()), self._popen.stdin
        )
        self._transports.append(transport)
        self._writer = StreamWriter(
            transport, protocol, None, loop
        )  # kept, because it closes the pipe when it is freed
        return _Input(self._writer), _Output(reader)

    async def wait(self) -> int:
        """Return the exit code once the process has exited, although another may still hold its output open."""
        while (code := self.returncode) is None:
            await self._sleep_until_exit()
        return code

    async def _sleep_until_exit(self) -> None:
        """Sleep until the process has exited, or a little while."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # not Linux, or no descriptors left
            await asyncio.sleep(EXIT_CHECK_INTERVAL)
            return
        loop = asyncio.get_running_loop()
        exited = asyncio.Event()
        try:
            loop.add_reader(pidfd, exited.set)
            await first(exited, within=EXIT_RECHECK_INTERVAL)
            loop.remove_reader(pidfd)
        finally:
            os.close(pidfd)

    def output(self) -> str:
        """Return the pipe that the process writes to, as /proc names it; empty once it has been read to its end."""
        pipe = self._popen.stdout
        # Both ends of a pipe have the same inode.
        return "" if pipe is None or pipe.closed else f"pipe:[{os.fstat(pipe.fileno()).st_ino}]"

    def close(self) -> None:
        """Close the pipes, even if another process holds the other end open."""
        for transport in self._transports:
            transport.close()


class _Input(ByteSendStream):
    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer

    async def send(self, item: bytes) -> None:
        self._writer.write(item)
        await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.close()


class _Output(ByteReceiveStream):
    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader

    async def receive(self, max_bytes: int = 2**16) -> bytes:
        data = await self._reader.read(max_bytes)
        if not data:
            raise EndOfStream
        return data

    async def aclose(self) -> None:
        """Nothing: `CLIProcess.close` closes both pipes."""
