"""Serves a folder over HTTPS on a free port, which it prints: files_over_tls.py FOLDER CERT KEY [AUTHORIZATION].

Supports GET and HEAD with ETag, Range and If-Range. With AUTHORIZATION it rejects requests without this header value.
"""

import http.server
import pathlib
import re
import ssl
import sys

folder, certificate, key = map(pathlib.Path, sys.argv[1:4])
authorization = sys.argv[4] if len(sys.argv) > 4 else None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if authorization and self.headers["Authorization"] != authorization:
            return self.answer(401, {"WWW-Authenticate": 'Basic realm="models"'})
        file = folder / self.path.split("?")[0].lstrip("/")
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            return self.answer(404)
        body, meta = file.read_bytes(), file.stat()
        headers = {"ETag": f'"{meta.st_mtime_ns:x}-{meta.st_size:x}"', "Accept-Ranges": "bytes"}
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if not requested or self.headers["If-Range"] not in (None, headers["ETag"]):
            return self.answer(200, headers, body)
        first, last = int(requested[1]), min(int(requested[2] or len(body)), len(body) - 1)
        if first > last:
            return self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        self.answer(206, headers, body[first : last + 1])

    do_HEAD = do_GET

    def answer(self, status, headers={}, body=b""):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
# The handshake runs in the thread of the connection, so that a client that never starts one does not block others.
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
print(server.server_port, flush=True)
server.serve_forever()
