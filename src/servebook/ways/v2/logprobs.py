"""Log probabilities as the tensor `logprobs` carries them, in Triton's vLLM backend and in the KServe predictor."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput


def logprobs_json(choice: CompletionOutput) -> str:
    """One object per new token: {token_id: {logprob, rank, decoded_token}}; "null" where none were asked for."""
    if choice.logprobs is None:
        return "null"
    return json.dumps(
        [
            {
                token_id: {"logprob": entry.logprob, "rank": entry.rank, "decoded_token": entry.decoded_token}
                for token_id, entry in position.items()
            }
            for position in choice.logprobs
        ]
    )
