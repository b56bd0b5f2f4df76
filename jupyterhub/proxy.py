"""The hub's proxy, `python proxy.py OPTIONS` with JSON: configurable-http-proxy, with TLS and room for everybody.

Its command line has no TLS. And its HTTP client is tornado's, which by default has ten connections and 20 s for each:
ten learners whose desks are opening, each with a page that waits for it, would keep everybody else out.
"""

import json
import logging
import os
import ssl
import sys

from configurable_http_proxy import configproxy
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders
from tornado.ioloop import IOLoop

CONNECTIONS = 1024
SECONDS = 600
"""How long an answer may take."""
MOST_BYTES, BODY_SECONDS = 32 << 20, 60
"""Of a request's body: JupyterLab sends files in pieces, and `room collect` takes notebooks of up to 20 MiB."""
BELIEVED = ("127.0.0.1", "::1")
SIGN = "X-Servebook-Proxy"
"""The header by which the hub knows that it is this proxy who says whose request it is; `door.py` reads it."""


class Handler(configproxy.ProxyHandler):
    """Tells the hub who calls: it counts tries by address.

    What a caller says of itself is taken out, but for the addresses that a web server on this machine names, where
    there is one (`behind`): tornado would believe X-Real-Ip, and X-Scheme, of anybody. The hub alone gets the sign: a
    desk, which hears from this proxy too, could ask the hub itself, and as if it were somebody else each time.
    """

    def _get_proxy_request(self, url):
        request = super()._get_proxy_request(url)
        request.headers = HTTPHeaders(request.headers)
        for name in ("X-Real-Ip", "X-Scheme", SIGN):
            request.headers.pop(name, None)
        caller = self.request.remote_ip
        believed = self.proxy.options["behind"] and caller in BELIEVED
        named = self.request.headers.get("X-Forwarded-For") if believed else None
        request.headers["X-Forwarded-For"] = ", ".join(filter(None, [named, caller]))
        if url.startswith(f"{self.proxy.options['hub_url']}/"):
            request.headers[SIGN] = self.proxy.options["sign"]
        return request


def main() -> None:
    """Serve until this process is ended."""
    options = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("tornado.access").setLevel(logging.CRITICAL)  # its lines have tokens in their addresses
    AsyncHTTPClient.configure(None, max_clients=CONNECTIONS)
    configproxy.ProxyHandler = Handler
    proxy = configproxy.PythonProxy(
        {
            "default_target": options["hub_url"],
            "error_target": f"{options['hub_url']}/hub/error",
            "auth_token": os.environ["CONFIGPROXY_AUTH_TOKEN"],
            "proxy_timeout": SECONDS,
            "behind": options["behind"],
            "hub_url": options["hub_url"],
            "sign": os.environ["SERVEBOOK_PROXY_SECRET"],
        }
    )
    tls = None
    if options["cert"]:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(options["cert"], options["cert_key"])
    # It keeps a body until it is whole, a stranger's too. What JupyterLab saves at a time is smaller.
    doors = HTTPServer(proxy.proxy_app, ssl_options=tls, max_body_size=MOST_BYTES, body_timeout=BODY_SECONDS)
    doors.listen(options["port"], options["host"])
    HTTPServer(proxy.api_app).listen(options["routes_port"], "127.0.0.1")
    IOLoop.current().start()


if __name__ == "__main__":
    main()
