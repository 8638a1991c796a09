"""A FastAPI service, metered and gated: `uvicorn service:app`."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice

from fastapi import FastAPI

from tollway import Bearer, ClaimedAccount, Emitter, Gate, Meter, MeterMiddleware, current_call

emitter = Emitter(os.environ["TOLLWAY_KAFKA_BOOTSTRAP"])
gate = Gate(os.environ["TOLLWAY_REDIS_URL"], emitter, deadline_s=2)
meter = Meter(emitter, gate=gate)
issuer = os.environ["ISSUER"]
who = Bearer(issuer=issuer, audience="https://api.example", jwks=f"{issuer}/jwks", directory=ClaimedAccount("org"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with emitter, gate:
        yield
        await meter.flush(10)


app = FastAPI(lifespan=lifespan)
app.add_middleware(MeterMiddleware, meter, identity=who, ask={"GET /search": {"rows": (100, 1)}})


@app.get("/search")
async def search(q: str) -> list[str]:
    call = current_call()
    assert call is not None
    found = list(islice((f"{q} {number}" for number in range(30)), call.granted("rows")))
    call.add(rows=len(found))
    return found
