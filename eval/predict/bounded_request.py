"""One HTTP request in bounded time, by urllib: when the time is over its connections are cut.

The timeout of a socket starts again with every byte. A server that sends one now and then, in the headers, in endless
`100 Continue`, in chunk sizes, in the body or in a TLS handshake, would never end the request. Cutting the connection
from outside ends each of these in the same way.
"""

import http.client
import socket
import threading
import time
import urllib.request
from contextlib import suppress
from typing import Self


class BoundedRequest:
    """The connections of one request, which `cut` ends; that happens by itself after `seconds`.

    State: a second handle on each socket, since urllib and TLS take the first over; whether it is over.
    """

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._deadline = time.monotonic() + seconds
        self._handles: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self.cut)
        self._timer.daemon = True  # else an interrupted program would wait for it
        self._timer.start()

    def open(self, request: urllib.request.Request, *, use_proxy: bool) -> http.client.HTTPResponse:
        """Send the request and read the headers of the answer. Redirects are faults, as is any status but 2xx.

        Raises what urllib raises.
        """
        handlers = [_NoRedirect, _BoundedHTTP(self), _BoundedHTTPS(self)]
        if not use_proxy:
            handlers.append(urllib.request.ProxyHandler({}))
        return urllib.request.build_opener(*handlers).open(request, timeout=self._seconds_left())

    def connect(self, address: tuple[str, int], *_: object) -> socket.socket:
        """A socket connected to the first of the host's addresses that accepts. Raises OSError."""
        error: OSError = TimeoutError()
        for family, kind, protocol, _name, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            connection = socket.socket(family, kind, protocol)
            try:
                self._watch(connection)
                connection.settimeout(self._seconds_left())
                connection.connect(place)
                return connection
            except OSError as fault:
                connection.close()
                error = fault
        raise error

    def cut(self) -> None:
        """End the request; whoever waits for one of its connections sees the end of it."""
        with self._lock:
            self.is_over = True
            for handle in self._handles:
                with suppress(OSError):  # already closed by the server
                    handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """No more waiting for the end of the time."""
        self._timer.cancel()
        with self._lock:
            for handle in self._handles:
                handle.close()
            self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _watch(self, connection: socket.socket) -> None:
        with self._lock:
            if self.is_over:
                raise TimeoutError
            self._handles.append(connection.dup())

    def _seconds_left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)  # 0 would mean that nothing may block


class _BoundedHTTP(urllib.request.HTTPHandler):
    """urllib's handler, with connections of a BoundedRequest."""

    def __init__(self, bounded: BoundedRequest) -> None:
        super().__init__()
        self._bounded = bounded

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Called by urllib."""
        return self.do_open(self._connection, request)

    def _connection(self, host: str, timeout: float) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(host, timeout=timeout)
        connection._create_connection = self._bounded.connect
        return connection


class _BoundedHTTPS(urllib.request.HTTPSHandler):
    """The same with TLS, whose handshake is a part of the request."""

    def __init__(self, bounded: BoundedRequest) -> None:
        super().__init__()
        self._bounded = bounded

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Called by urllib."""
        return self.do_open(self._connection, request)

    def _connection(self, host: str, timeout: float) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection(host, timeout=timeout)
        connection._create_connection = self._bounded.connect
        return connection


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as the fault that its status is: following it would carry the key elsewhere."""

    def http_error_302(self, *arguments: object) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302
