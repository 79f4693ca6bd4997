"""waitress: what ccm's server leans on. Only its `waitress.serve` and the settings are promised."""

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
        (HTTPChannel, "handle_close", "_ServerLimits.maintenance ends slow clients with it"),
        (HTTPChannel, "check_client_disconnected", "_Channel.check_client_disconnected asks the socket too"),
        (HTTPChannel, "request", "Channel.is_too_slow reads it"),
        (HTTPChannel, "parser_class", "_Channel sets it"),
        (HTTPChannel, "task_class", "_Channel sets it"),
        (HTTPChannel, "error_task_class", "_Channel sets it"),
        (HTTPRequestParser, "parse_header", "Parser.parse_header puts _RequestBody in place"),
        (HTTPRequestParser, "received", "Parser.received refuses a body that was dropped"),
        (HTTPRequestParser, "completed", "Parser.received reads it"),
        (HTTPRequestParser, "error", "Parser.received sets it"),
        (HTTPRequestParser, "body_rcv", "Parser.parse_header changes its buffer"),
        (HTTPRequestParser, "headers_finished", "Channel.is_too_slow reads it"),
        (OverflowableBuffer, "append", "_RequestBody.append survives a full disk"),
        (OverflowableBuffer, "close", "_RequestBody.close survives a full disk"),
        (ReadOnlyFileBasedBuffer, "prepare", "Channel.write_soon calls it"),
        (WSGITask, "finish", "_Task.finish ends the answer to HEAD without a chunk"),
        (WSGITask, "wrote_header", "_Task.finish reads it"),
        (WSGITask, "chunked_response", "_Task.finish sets it"),
        (ErrorTask, "execute", "_JsonErrorTask.execute answers in JSON"),
        (ErrorTask, "write", "_JsonErrorTask.execute calls it"),
        (ErrorTask, "set_close_on_finish", "_JsonErrorTask.execute calls it"),
        (ErrorTask, "content_length", "_JsonErrorTask.execute sets it"),
        (ErrorTask, "status", "_JsonErrorTask.execute sets it"),
        (Error, "code", "_JsonErrorTask.execute reads it, _OutOfDisk sets it"),
        (Error, "reason", "_JsonErrorTask.execute reads it, _OutOfDisk sets it"),
        (ThreadedTaskDispatcher, "active_count", "Server._shut_down waits until it is 0"),
        (ThreadedTaskDispatcher, "set_thread_count", "open_server calls it"),
        (ThreadedTaskDispatcher, "shutdown", "Server._shut_down calls it"),
        *(
            (kind, name, used)
            for kind in (TcpWSGIServer, UnixWSGIServer)
            for name, used in (
                ("maintenance", "_ServerLimits.maintenance looks through the connections"),
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
def test_the_name_is_there(owner: Any, name: str, used: str) -> None:
    assert hasattr(owner, name), f"waitress has no {owner.__name__}.{name} any more: {used}"


@pytest.mark.parametrize(
    "name",
    [
        *("sockets", "channel_timeout", "cleanup_interval", "threads", "connection_limit", "max_request_header_size"),
        *("max_request_body_size", "channel_request_lookahead", "outbuf_high_watermark", "outbuf_overflow"),
        *("asyncore_use_poll", "ident", "clear_untrusted_proxy_headers", "inbuf_overflow"),
    ],
)
def test_the_setting_is_there(name: str) -> None:
    assert hasattr(Adjustments, name), f"waitress has no setting {name} any more: open_server or _RequestBody uses it"


def app(_environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


@pytest.fixture
def server() -> Iterator[Any]:
    """A server that listens, and whose loop does not run."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = open_server(app, bound, Channel, 1)
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
        ("active_channels", dict, "_ServerLimits.maintenance and Server._unsent_bytes look through it"),
        ("task_dispatcher", ThreadedTaskDispatcher, "Server._shut_down waits for it"),
        ("trigger", object, "Server._shut_down wakes the loop with it"),
        ("_map", dict, "tests close all that is in it"),
        ("channel_class", type, "open_server sets it"),
    ],
)
def test_a_server_has_the_attribute(server: Any, name: str, kind: type, used: str) -> None:
    assert isinstance(getattr(server, name, None), kind), f"waitress' server has no {name} any more: {used}"


def test_a_server_makes_our_channels(server: Any) -> None:
    assert server.channel_class is Channel, "waitress sets its own class after open_server has"


@pytest.mark.parametrize("name", ["requests", "total_outbufs_len", "last_activity", "socket", "server", "adj"])
def test_a_channel_has_the_attribute(channel: Any, name: str) -> None:
    assert hasattr(channel, name), f"waitress' channel has no {name} any more: Channel and _Channel read it"


def test_a_channel_is_among_those_of_its_server(server: Any, channel: Any) -> None:
    assert channel in server.active_channels.values(), "_ServerLimits.maintenance would look through no channel"


def test_a_channel_tells_how_far_its_request_has_come(channel: Any) -> None:
    channel.received(REQUEST[:20])
    assert channel.request is not None, "Channel.received would not notice the beginning of a request"
    assert not channel.request.headers_finished, "Channel.is_too_slow would take headers for received"
    channel.received(REQUEST[20:])
    assert channel.request.headers_finished, "Channel.is_too_slow would take headers for missing"


def test_a_body_is_kept_in_a_buffer_that_can_be_replaced() -> None:
    parser = Parser(Adjustments())
    parser.received(REQUEST)
    buffer = parser.body_rcv.buf
    parser.received(b"abc")

    assert type(buffer).__name__ == "_RequestBody", "Parser.parse_header does not replace the buffer"
    assert len(buffer) == 3, "waitress keeps the body somewhere else than in body_rcv.buf"
    assert parser.completed, "waitress does not end a request with its last byte"
    parser.close()


def test_a_request_tells_its_method() -> None:
    parser = Parser(Adjustments())
    parser.received(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")

    assert parser.command == "HEAD", "_Task.finish would not know a HEAD"
    parser.close()


def test_bytes_that_wait_are_counted_and_sent_by_the_loop(channel: Any) -> None:
    channel.write_soon(b"x" * 2**19)  # more than a socket takes at once

    assert 0 < channel.total_outbufs_len < 2**19, "Server._unsent_bytes would end a drain too early"
    assert not channel.will_close, "waitress closes a channel that has just been written to"


def test_a_file_goes_out_as_it_is(channel: Any) -> None:
    channel.write_soon(b"x" * 2**21)

    assert 0 < channel.total_outbufs_len < 2**21, "the piece in a file is not counted"
    assert any(isinstance(buffer, ReadOnlyFileBasedBuffer) for buffer in channel.outbufs), (
        "Channel.write_soon's file is copied into memory"
    )


def test_the_trigger_runs_something_in_the_loop_and_the_loop_ends_without_sockets(server: Any) -> None:
    ran_in: list[str] = []

    def act() -> None:
        ran_in.append(threading.current_thread().name)
        wasyncore.close_all(server._map)

    loop = threading.Thread(target=serve, args=(server,), name="loop", daemon=True)
    loop.start()
    server.trigger.pull_trigger(act)
    loop.join(60)

    assert ran_in == ["loop"], "Server._shut_down would run in another thread than the loop's"
    assert not loop.is_alive(), "the loop goes on without a socket: serve() would never tell that nobody can connect"


def test_closing_the_dispatcher_leaves_the_trigger(server: Any) -> None:
    wasyncore.dispatcher.close(server)

    assert server.socket is None, "Server._shut_down does not close the listening socket"
    server.trigger.pull_trigger(lambda: None)  # raises if it is closed: answers under way are sent through it


def test_maintenance_is_asked_with_the_time(server: Any) -> None:
    server.next_channel_cleanup = 0
    server.maintenance(time.time())
