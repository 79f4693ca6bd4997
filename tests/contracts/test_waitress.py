"""The parts of waitress that ccm's server uses. waitress documents only `waitress.serve` and its settings."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

import pytest
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer, ReadOnlyFileBasedBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import TcpWSGIServer, UnixWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import Error

from ccm.server.connections import Channel, Parser, open_server, serve

REQUEST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n"


@pytest.mark.parametrize(
    ("owner", "name", "used"),
    [
        (HTTPChannel, "received", "Channel.received notes when a request begins"),
        (HTTPChannel, "write_soon", "Channel.write_soon puts large pieces into files"),
        (HTTPChannel, "handle_close", "_ServerLimits.maintenance disconnects slow clients with it"),
        (HTTPChannel, "check_client_disconnected", "_Channel.check_client_disconnected also checks the socket"),
        (HTTPChannel, "request", "Channel.is_too_slow reads it"),
        (HTTPChannel, "parser_class", "_Channel sets it"),
        (HTTPChannel, "task_class", "_Channel sets it"),
        (HTTPChannel, "error_task_class", "_Channel sets it"),
        (HTTPRequestParser, "parse_header", "Parser.parse_header installs _RequestBody"),
        (HTTPRequestParser, "received", "Parser.received refuses a body that was dropped"),
        (HTTPRequestParser, "completed", "Parser.received reads it"),
        (HTTPRequestParser, "error", "Parser.received sets it"),
        (HTTPRequestParser, "body_rcv", "Parser.parse_header changes its buffer"),
        (HTTPRequestParser, "headers_finished", "Channel.is_too_slow reads it"),
        (OverflowableBuffer, "append", "_RequestBody.append survives a full disk"),
        (OverflowableBuffer, "close", "_RequestBody.close survives a full disk"),
        (ReadOnlyFileBasedBuffer, "prepare", "Channel.write_soon calls it"),
        (WSGITask, "write", "_Task.write sends the header with the first part of the body"),
        (WSGITask, "build_response_header", "_Task.write calls it"),
        (WSGITask, "complete", "_Task.write reads it"),
        (WSGITask, "has_body", "_Task.write reads it"),
        (WSGITask, "content_length", "_Task.write reads it"),
        (WSGITask, "finish", "_Task.finish ends the answer to HEAD without a chunk"),
        (WSGITask, "wrote_header", "_Task.finish reads it, _Task.write sets it"),
        (WSGITask, "chunked_response", "_Task.finish sets it"),
        (ErrorTask, "execute", "_JsonErrorTask.execute answers in JSON"),
        (ErrorTask, "write", "_JsonErrorTask.execute calls it"),
        (ErrorTask, "set_close_on_finish", "_JsonErrorTask.execute calls it"),
        (ErrorTask, "content_length", "_JsonErrorTask.execute sets it"),
        (ErrorTask, "status", "_JsonErrorTask.execute sets it"),
        (Error, "code", "_JsonErrorTask.execute reads it, _OutOfDisk sets it"),
        (Error, "reason", "_JsonErrorTask.execute reads it, _OutOfDisk sets it"),
        (ThreadedTaskDispatcher, "active_count", "Server._shut_down waits until it is 0"),
        (ThreadedTaskDispatcher, "shutdown", "Server._shut_down calls it"),
        (ThreadedTaskDispatcher, "set_thread_count", "_dispatcher starts the threads with it"),
        *(
            (kind, name, used)
            for kind in (TcpWSGIServer, UnixWSGIServer)
            for name, used in (
                ("maintenance", "_ServerLimits.maintenance checks the connections"),
                ("readable", "_ServerLimits.readable pauses after a lack of descriptors"),
                ("accept", "_ServerLimits.accept survives a lack of descriptors"),
                ("handle_error", "_ServerLimits.handle_error keeps the listening socket open"),
                ("handle_close", "_ServerLimits.handle_close ends the loop"),
                ("channel_class", "open_server sets it"),
                ("run", "serve() runs it"),
            )
        ),
        (wasyncore, "ExitNow", "_ServerLimits.handle_close raises it, serve() catches it"),
        (wasyncore.dispatcher, "close", "Server._shut_down closes the socket with it, and not the trigger"),
    ],
)
def test_waitress_has_the_name(owner: Any, name: str, used: str) -> None:
    assert hasattr(owner, name), f"waitress has no {owner.__name__}.{name}: {used}"


@pytest.mark.parametrize(
    "name",
    [
        *("sockets", "channel_timeout", "cleanup_interval", "threads", "connection_limit", "max_request_header_size"),
        *("max_request_body_size", "channel_request_lookahead", "outbuf_high_watermark", "outbuf_overflow"),
        *("asyncore_use_poll", "ident", "clear_untrusted_proxy_headers", "inbuf_overflow"),
    ],
)
def test_waitress_has_the_setting(name: str) -> None:
    assert hasattr(Adjustments, name), f"waitress has no setting {name}: open_server or _RequestBody uses it"


def app(_environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


@pytest.fixture
def server() -> Iterator[Any]:
    """Create a server that listens but does not run its loop."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = open_server(app, bound, Channel, threads=1)
    yield server
    wasyncore.close_all(server._map)
    server.task_dispatcher.shutdown(timeout=30)


@pytest.fixture
def channel(server: Any) -> Iterator[Any]:
    here, there = socket.socketpair()
    with closing(there):
        channel = Channel(server, here, ("", 0), server.adj, map=server._map)
        yield channel
        channel.handle_close()


@pytest.mark.parametrize(
    ("name", "kind", "used"),
    [
        ("active_channels", dict, "_ServerLimits.maintenance and Server._unsent_bytes iterate over it"),
        ("task_dispatcher", ThreadedTaskDispatcher, "Server._shut_down waits for it"),
        ("trigger", object, "Server._shut_down wakes the loop with it"),
        ("_map", dict, "tests close everything in it"),
        ("channel_class", type, "open_server sets it"),
    ],
)
def test_a_server_has_the_attribute(server: Any, name: str, kind: type, used: str) -> None:
    assert isinstance(getattr(server, name, None), kind), f"the server of waitress has no {name}: {used}"


def test_a_server_makes_our_channels(server: Any) -> None:
    assert server.channel_class is Channel, "waitress sets its own class after open_server does"


@pytest.mark.parametrize("name", ["requests", "total_outbufs_len", "last_activity", "socket", "server", "adj"])
def test_a_channel_has_the_attribute(channel: Any, name: str) -> None:
    assert hasattr(channel, name), f"the channel of waitress has no {name}: Channel and _Channel read it"


def test_a_server_lists_its_channels(server: Any, channel: Any) -> None:
    assert channel in server.active_channels.values(), "_ServerLimits.maintenance would check no channel"


def test_a_channel_shows_the_progress_of_its_request(channel: Any) -> None:
    channel.received(REQUEST[:20])
    assert channel.request is not None, "Channel.received would miss the beginning of a request"
    assert not channel.request.headers_finished, "Channel.is_too_slow would consider the headers complete"
    channel.received(REQUEST[20:])
    assert channel.request.headers_finished, "Channel.is_too_slow would consider the headers incomplete"


def test_the_buffer_of_a_body_can_be_replaced() -> None:
    parser = Parser(Adjustments())
    parser.received(REQUEST)
    buffer = parser.body_rcv.buf
    parser.received(b"abc")

    assert type(buffer).__name__ == "_RequestBody", "Parser.parse_header does not replace the buffer"
    assert len(buffer) == 3, "waitress does not keep the body in body_rcv.buf"
    assert parser.completed, "waitress does not complete a request with its last byte"
    parser.close()


def test_a_request_has_its_method() -> None:
    parser = Parser(Adjustments())
    parser.received(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")

    assert parser.command == "HEAD", "_Task.finish would not recognise HEAD"
    parser.close()


def test_a_dispatcher_waits_on_the_condition_that_was_put_there() -> None:
    dispatcher = ThreadedTaskDispatcher()
    assert isinstance(dispatcher.queue_cv, threading.Condition), "_dispatcher replaces another attribute"
    assert isinstance(dispatcher.lock, type(threading.Lock())), "NewestFirst.wait releases another lock"


def test_the_loop_counts_and_sends_pending_bytes(channel: Any) -> None:
    channel.write_soon(b"x" * 2**19)  # more than a socket buffers

    assert 0 < channel.total_outbufs_len < 2**19, "Server._unsent_bytes would end a drain too early"
    assert not channel.will_close, "waitress closes a channel after a write"


def test_a_file_is_sent_without_a_copy_in_memory(channel: Any) -> None:
    channel.write_soon(b"x" * 2**21)

    assert 0 < channel.total_outbufs_len < 2**21, "waitress does not count the bytes in a file"
    assert any(isinstance(buffer, ReadOnlyFileBasedBuffer) for buffer in channel.outbufs), (
        "waitress copies the file of Channel.write_soon into memory"
    )


def test_the_trigger_runs_a_function_in_the_loop_and_the_loop_ends_without_sockets(server: Any) -> None:
    ran_in: list[str] = []

    def act() -> None:
        ran_in.append(threading.current_thread().name)
        wasyncore.close_all(server._map)

    loop = threading.Thread(target=serve, args=(server,), name="loop", daemon=True)
    loop.start()
    server.trigger.pull_trigger(act)
    loop.join(60)

    assert ran_in == ["loop"], "Server._shut_down would run outside the loop's thread"
    assert not loop.is_alive(), (
        "the loop continues without a socket: serve() would never report that no client can connect"
    )


def test_closing_the_server_keeps_the_trigger(server: Any) -> None:
    wasyncore.dispatcher.close(server)

    assert server.socket is None, "Server._shut_down does not close the listening socket"
    server.trigger.pull_trigger(lambda: None)  # raises if closed; pending answers are sent through it


def test_maintenance_takes_the_time(server: Any) -> None:
    server.next_channel_cleanup = 0
    server.maintenance(time.time())
