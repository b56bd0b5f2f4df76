"""servebook, the LLM serving workbook: serve one model with vLLM in every way, then measure and choose."""

from servebook.errors import ServebookError
from servebook.launch import serve
from servebook.settings import Settings, load_settings

__all__ = ["ServebookError", "Settings", "load_settings", "serve"]
