"""HTTP connections that keep the terms, straight and through proxies.

urllib3 bounds each attempt to connect and each read. Here the look-up of the name and all attempts are bounded
together, sending by `stall` instead of `connect`, and bytes that trickle by their rate.
"""

from __future__ import annotations

import http.client
import io
import os
import socket
import threading
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3 import exceptions
from urllib3.connection import HTTPConnection, HTTPSConnection

from pipeline.remotes.contract import Terms
from pipeline.remotes.waiting import Pace, connected

_IDLE = 32  # connections that are kept for the next request


class Connections:
    """Connections to any server, kept for the next request. Every method may be called from any thread."""

    def __init__(self, terms: Terms) -> None:
        self._pools = _pool_classes(terms)
        self._managers: dict[str, urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def to(self, url: str) -> urllib3.PoolManager:
        """What sends requests to a URL: directly, or through the proxy that the environment names for it."""
        parts = urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme, "")
        if proxy and urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
            proxy = ""
        with self._lock:
            if proxy not in self._managers:
                self._managers[proxy] = self._manager(proxy)
            return self._managers[proxy]

    def clear(self) -> None:
        """Ends those that nobody uses at the moment."""
        with self._lock:
            for manager in self._managers.values():
                manager.clear()

    def _manager(self, proxy: str) -> urllib3.PoolManager:
        given: dict[str, Any] = {"maxsize": _IDLE}
        if bundle := os.environ.get("REQUESTS_CA_BUNDLE"):
            given["ca_certs"] = bundle
        manager: urllib3.PoolManager
        if proxy:
            proxy = proxy if "://" in proxy else f"http://{proxy}"
            user = urllib3.util.parse_url(proxy).auth
            headers = urllib3.make_headers(proxy_basic_auth=user) if user else None
            manager = urllib3.ProxyManager(proxy, proxy_headers=headers, **given)
        else:
            manager = urllib3.PoolManager(**given)
        manager.pool_classes_by_scheme = self._pools
        return manager


def _pool_classes(terms: Terms) -> dict[str, Any]:
    """urllib3's pools, by scheme, with connections that are made and used within the terms."""

    class Answer(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *given: Any, **named: Any) -> None:
            super().__init__(sock, *given, **named)
            raw = self.fp.detach()
            self.fp = io.BufferedReader(_Paced(raw, Pace(terms.stall)))

    class Bounded:
        response_class = Answer
        sock: socket.socket | None
        host: str
        port: int
        _dns_host: str

        def _new_conn(self) -> socket.socket:
            try:
                return connected(self._dns_host, self.port, terms.connect)
            except socket.gaierror as error:
                raise exceptions.NameResolutionError(self.host, self, error) from error  # type: ignore[arg-type]
            except TimeoutError as error:
                raise exceptions.ConnectTimeoutError(self, "no connection in time") from error
            except OSError as error:
                raise exceptions.NewConnectionError(self, "no connection") from error  # type: ignore[arg-type]

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            assert self.sock is not None
            self.sock.settimeout(terms.stall)

        def putrequest(self, *given: Any, **named: Any) -> None:
            if self.sock is not None:
                self.sock.settimeout(terms.stall)
            super().putrequest(*given, **named)  # type: ignore[misc]

    class Plain(Bounded, HTTPConnection):  # type: ignore[misc]
        pass

    class Secure(Bounded, HTTPSConnection):  # type: ignore[misc]
        pass

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


class _Paced(io.RawIOBase):
    """A connection's bytes, which must come fast enough."""

    def __init__(self, raw: Any, pace: Pace) -> None:
        self._raw = raw
        self._pace = pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        began = time.monotonic()
        count: int | None = self._raw.readinto(buffer)
        self._pace.moved(count or 0, time.monotonic() - began)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
