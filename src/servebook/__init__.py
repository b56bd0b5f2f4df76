"""servebook, the LLM serving workbook: serve one model with vLLM in every way, then measure and choose."""

from typing import TYPE_CHECKING

from servebook.environment import reach_loopback_directly
from servebook.lazy import lazily

if TYPE_CHECKING:
    from servebook.errors import ServebookError
    from servebook.launch.lifetime import serve
    from servebook.settings import Settings, load_settings

__all__ = ["ServebookError", "Settings", "load_settings", "serve"]

reach_loopback_directly()  # before any client of ours, or of a library, looks for a proxy

__getattr__ = lazily(
    __name__,
    errors=("ServebookError",),
    **{"launch.lifetime": ("serve",)},
    settings=("Settings", "load_settings"),
)
