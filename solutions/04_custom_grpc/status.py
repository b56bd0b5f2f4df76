"""LLMService in front of vLLM, with a status for each fault."""

import grpc
import openai
from upstream import MODEL, client

from llm.v1 import llm_pb2, llm_pb2_grpc


class Servicer(llm_pb2_grpc.LLMServiceServicer):
    async def Generate(self, request, context):
        ### BEGIN SOLUTION check the arguments, ask the engine, translate what goes wrong (about 13 lines)
        if not request.prompt:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "prompt is empty")
        if request.HasField("max_tokens") and request.max_tokens < 1:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "max_tokens is less than 1")
        limit = {"max_tokens": request.max_tokens} if request.HasField("max_tokens") else {}
        try:
            answer = await client.completions.create(model=MODEL, prompt=request.prompt, **limit)
        except openai.BadRequestError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
        except openai.APIConnectionError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the engine cannot be reached")
        return llm_pb2.GenerateResponse(text=answer.choices[0].text)
        ### END SOLUTION
