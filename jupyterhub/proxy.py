"""Runs configurable-http-proxy with connections for a whole room.

Its HTTP client is tornado's, which by default has ten connections: ten learners whose desks are opening, each with a
page that waits for it, would keep everybody else out.
"""

from configurable_http_proxy.cli import main
from tornado.httpclient import AsyncHTTPClient

AsyncHTTPClient.configure(None, max_clients=1024)
main()
