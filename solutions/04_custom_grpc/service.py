"""LLMService in front of vLLM."""

from upstream import MODEL, client

from llm.v1 import llm_pb2, llm_pb2_grpc


class Servicer(llm_pb2_grpc.LLMServiceServicer):
    async def StreamGenerate(self, request, context):
        ### BEGIN SOLUTION yield one StreamGenerateResponse per chunk of the engine's stream (about 13 lines)
        reasons = {"length": llm_pb2.FINISH_REASON_LENGTH, "stop": llm_pb2.FINISH_REASON_STOP}
        sequence = 0
        async with await client.completions.create(
            model=MODEL, prompt=request.prompt, max_tokens=request.max_tokens, stream=True
        ) as chunks:
            async for chunk in chunks:
                choice = chunk.choices[0]
                yield llm_pb2.StreamGenerateResponse(
                    text=choice.text,
                    sequence=sequence,
                    is_finished=choice.finish_reason is not None,
                    finish_reason=reasons.get(choice.finish_reason),
                )
                sequence += 1
        ### END SOLUTION
