"""What all steps are served by: KServe's ModelServer, over REST, for this machine only."""

from __future__ import annotations

from kserve import ModelServer

from servebook.settings import LOOPBACK


class LoopbackServer(ModelServer):  # type: ignore[misc]
    """KServe's own listens on every network interface, without asking."""

    def __init__(self, http_port: int) -> None:
        super().__init__(http_port=http_port, enable_grpc=False, grace_period=1)

    async def _serve(self) -> None:
        self._rest_server.config.host = LOOPBACK
        await super()._serve()
