"""Functions of agent programs, which a worker process imports."""

import asyncio
import json
import os
import signal
import time
import urllib.request
from contextlib import asynccontextmanager


def post(base_url, api_key, words):
    body = {"model": "m", "messages": [{"role": "user", "content": words}]}
    headers = {"content-type": "application/json", "Authorization": f"Bearer {api_key}"}
    request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


async def plays(base_url, api_key, row):
    print("printed by a program")
    await asyncio.to_thread(post, base_url, api_key, "hello")
    match row["does"]:
        case "blocks":
            time.sleep(600)
        case "holds":
            time.sleep(6.0)
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raises":
            raise ValueError("broken")
        case "waits":
            await asyncio.sleep(600)
    return {"reward": float(row["n"])}


def plain(base_url, api_key, row):
    post(base_url, api_key, "hello")
    return row["n"]


def talks(base_url, api_key, row):
    """Rewards a turn by the parity of its length."""
    answer = post(base_url, api_key, "hello")
    return answer["usage"]["completion_tokens"] % 2


class Unopened:
    async def __call__(self, base_url, api_key, row):
        return 1.0

    @asynccontextmanager
    async def serving(self):
        raise OSError("no port is free")
        yield


unopened = Unopened()
