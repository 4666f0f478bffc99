"""Between a client and a real server: hands everything on, and breaks what a test says it shall break."""

import http.client
import http.server
import json
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    body: dict


class Broken(NamedTuple):
    """What a client gets in place of the server's answer; without a status no answer, with `hangs` not even an end."""

    status: int | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    body: Mapping = MappingProxyType({})
    hangs: bool = False


class Proxy(http.server.ThreadingHTTPServer):
    """`break_(request, number)` says what happens to the request of that number; None hands it on.

    Attributes:
      url: of the proxy, with the path of the server's.
      requests: those that came, in order.
      most: how many were handed on at once.
    """

    daemon_threads = True

    def __init__(self, url: str, break_: Callable[[Request, int], Broken | None] = lambda request, number: None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_url = urllib.parse.urlsplit(url)
        self.url = f"http://127.0.0.1:{self.server_port}{self.server_url.path}"
        self.break_ = break_
        self.requests: list[Request] = []
        self.most = self.under_way = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        request = Request(self.path, dict(self.headers), json.loads(content or "{}"))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(request)
        broken = self.server.break_(request, number)
        if broken is None:
            self.hand_on(content)
        elif broken.status is not None:
            self.answer(broken.status, dict(broken.headers), json.dumps(dict(broken.body)).encode())
        else:
            if broken.hangs:
                self.server.ended.wait()
            self.close_connection = True

    do_GET = do_POST

    def hand_on(self, content: bytes):
        with self.server.lock:
            self.server.under_way += 1
            self.server.most = max(self.server.most, self.server.under_way)
        upstream = http.client.HTTPConnection(self.server.server_url.netloc)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            upstream.request(self.command, self.path, content, headers)
            response = upstream.getresponse()
            self.answer(response.status, {"content-type": response.headers["content-type"]}, response.read())
        except OSError:
            self.close_connection = True  # as a server does that is killed
        finally:
            upstream.close()
            with self.server.lock:
                self.server.under_way -= 1

    def answer(self, status: int, headers: dict[str, str], content: bytes):
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
