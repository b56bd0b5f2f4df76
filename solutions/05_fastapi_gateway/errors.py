"""A gateway that says whose fault it is."""

import openai
from fastapi import FastAPI, HTTPException
from upstream import MODEL, Ask, client

app = FastAPI()


### BEGIN SOLUTION POST /chat, with each error's own status (about 12 lines)
@app.post("/chat")
async def chat(ask: Ask) -> dict[str, str]:
    messages = [{"role": "user", "content": ask.message}]
    try:
        answer = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=ask.max_tokens)
    except openai.BadRequestError as error:
        raise HTTPException(400, detail="the engine refuses the arguments") from error
    except openai.APITimeoutError as error:
        raise HTTPException(504, detail="the engine is too slow") from error
    except openai.APIConnectionError as error:
        raise HTTPException(503, detail="the engine cannot be reached", headers={"Retry-After": "5"}) from error
    return {"response": answer.choices[0].message.content}


### END SOLUTION
