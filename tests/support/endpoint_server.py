"""An endpoint on 127.0.0.1 that answers by a script."""

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from eval.predict.endpoint import Endpoint

KEY = "sk-secret-123"


class Server:
    """Answers the n-th request (from 0) by `script(n, path, body)`: (status, body bytes or object, headers)."""

    def __init__(self, script):
        server, self.requests, lock = self, [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append((self.path, body, dict(self.headers)))
                status, content, headers = script(number, self.path, body)
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                with suppress(ConnectionError):  # a client that was too slow, or stopped, has gone
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def endpoint(self, **changes):
        return Endpoint(
            **{
                "url": self.url,
                "model": "m",
                "api_key": KEY,
                "timeout_seconds": 5.0,
                "attempts": 4,
                "concurrency": 4,
                **changes,
            }
        )
