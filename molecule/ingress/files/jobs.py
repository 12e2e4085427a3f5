"""A Serve app beside Berth's: jobs that run long, stream, and notice when they are cancelled. Run on the head."""

import asyncio

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse


@serve.deployment(num_replicas=1, max_ongoing_requests=50, ray_actor_options={"num_cpus": 0.1})
class Jobs:
    def __init__(self) -> None:
        self.running = self.cancelled = self.done = 0

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return JSONResponse({"running": self.running, "cancelled": self.cancelled, "done": self.done})
        return StreamingResponse(self._work(await request.json()), media_type="text/event-stream")

    async def _work(self, job: dict[str, float]):
        self.running += 1
        try:
            for number in range(int(job["lines"])):
                yield f"data: {number}\n\n"
                await asyncio.sleep(job["pause_s"])
            self.done += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


serve.run(Jobs.bind(), name="jobs", route_prefix="/jobs")
