"""The engine that SERVEBOOK_ENGINE_URL names: nobody starts or ends it, it is only asked."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from servebook.bearer import bearer
from servebook.environment import JUDGE_APART
from servebook.errors import LaunchError
from servebook.settings import Settings

AWAY = "Wait a minute, then try again: it is busy, or is being started again."


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
        status = error.response.status_code
        advice = "Correct SERVEBOOK_ENGINE_URL: it must be a vLLM."
        if status in (401, 403):
            advice = for_refused()
        elif status in (429, 502, 503, 504):
            advice = AWAY
        raise LaunchError(
            f"The engine at {url} answers {status} {error.response.reason} to GET /v1/models.", advice
        ) from None
    except (requests.RequestException, LookupError, TypeError, ValueError):
        raise LaunchError(
            f"No vLLM answers at SERVEBOOK_ENGINE_URL={url}.",
            AWAY if at_a_desk() else "Start it there, correct the URL, or unset it to run an engine here.",
        ) from None
    http = urlsplit(url).netloc if url.startswith("http://") and not urlsplit(url).path else url
    return model, {"http": http}


def at_a_desk() -> bool:
    """Whether this is a learner's desk in a room, which has its engine and its key from there."""
    return JUDGE_APART in os.environ


def for_refused() -> str:
    """What to do about a key that does not count: a learner in a room was given it, others have set it."""
    if not at_a_desk():
        return "Set SERVEBOOK_API_KEY to a key of that engine."
    return (
        "Your key was replaced or taken away: File → Hub Control Panel → Stop My Server, then Start My Server; "
        "or ask the instructor."
    )
