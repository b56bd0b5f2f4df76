"""The engine that SERVEBOOK_ENGINE_URL names: nobody starts or ends it, it is only asked."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from servebook.bearer import bearer
from servebook.environment import JUDGE_APART
from servebook.errors import LaunchError
from servebook.settings import Settings


def ask_elsewhere(settings: Settings) -> tuple[str, dict[str, str]]:
    """The name of its model, and its endpoints.

    Raises:
        LaunchError: no vLLM answers there, or not to this key.
    """
    import requests

    url = str(settings.engine_url)
    try:
        answer = requests.get(f"{url}/v1/models", auth=bearer(settings.key), timeout=(10, 60))
        answer.raise_for_status()
        model = answer.json()["data"][0]["id"]
    except requests.HTTPError as error:
        refused = error.response.status_code in (401, 403)
        raise LaunchError(
            f"The engine at {url} answers {error.response.status_code} {error.response.reason} to GET /v1/models.",
            for_refused() if refused else "Correct SERVEBOOK_ENGINE_URL: it must be a vLLM.",
        ) from None
    except (requests.RequestException, LookupError, TypeError, ValueError):
        raise LaunchError(
            f"No vLLM answers at SERVEBOOK_ENGINE_URL={url}.",
            "Start it there, correct the URL, or unset it to run an engine here.",
        ) from None
    http = urlsplit(url).netloc if url.startswith("http://") and not urlsplit(url).path else url
    return model, {"http": http}


def for_refused() -> str:
    """What to do about a key that does not count: a learner in a room was given it, others have set it."""
    if JUDGE_APART not in os.environ:
        return "Set SERVEBOOK_API_KEY to a key of that engine."
    return (
        "Your key was replaced or taken away: File → Hub Control Panel → Stop My Server, then Start My Server; "
        "or ask the instructor."
    )
