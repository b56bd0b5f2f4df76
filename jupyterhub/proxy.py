"""The hub's proxy, `python proxy.py OPTIONS` with JSON: configurable-http-proxy, with TLS and room for everybody.

Its command line has no TLS. And its HTTP client is tornado's, which by default has ten connections and 20 s for each:
ten learners whose desks are opening, each with a page that waits for it, would keep everybody else out.
"""

import json
import logging
import os
import ssl
import sys

from configurable_http_proxy.configproxy import PythonProxy
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop

CONNECTIONS = 1024
SECONDS = 600
"""How long an answer may take."""

options = json.loads(sys.argv[1])
logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
logging.getLogger("tornado.access").setLevel(logging.CRITICAL)  # its lines have tokens in their addresses
AsyncHTTPClient.configure(None, max_clients=CONNECTIONS)
proxy = PythonProxy(
    {
        "default_target": options["hub_url"],
        "error_target": f"{options['hub_url']}/hub/error",
        "auth_token": os.environ["CONFIGPROXY_AUTH_TOKEN"],
        "proxy_timeout": SECONDS,
    }
)
tls = None
if options["cert"]:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(options["cert"], options["cert_key"])
HTTPServer(proxy.proxy_app, ssl_options=tls).listen(options["port"], options["host"])
HTTPServer(proxy.api_app).listen(options["routes_port"], "127.0.0.1")
IOLoop.current().start()
