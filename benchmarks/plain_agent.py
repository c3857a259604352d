"""The agent of examples/openai_agent over a plain HTTP client: what is left of a program's cost without the openai client."""

from __future__ import annotations

import asyncio
import json
import random

import aiohttp

from openai_agent.agent import LATENCY_S, SYSTEM, TOOLS, Desk

_sessions: list[aiohttp.ClientSession] = []  # one, which all episodes share


async def agent(base_url: str, api_key: str, row: dict[str, object]) -> float:
    """Serve one customer."""
    if not _sessions:
        _sessions.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    desk, headers = Desk(row), {"Authorization": f"Bearer {api_key}"}
    messages: list[dict[str, object]] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": desk.opening()},
    ]
    for _ in range(16):
        asked = {"model": "policy", "messages": messages, "tools": TOOLS}
        async with _sessions[0].post(f"{base_url}/chat/completions", json=asked, headers=headers) as response:
            response.raise_for_status()
            choice = (await response.json())["choices"][0]
        message = choice["message"]
        messages.append(message)
        if choice["finish_reason"] == "length":
            return 0.0
        await asyncio.sleep(random.expovariate(1 / LATENCY_S))
        if calls := message.get("tool_calls"):
            for call in calls:
                result = desk.call(call["function"]["name"], **json.loads(call["function"]["arguments"]))
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
            continue
        reply = desk.hear(message.get("content") or "")
        if reply is None:
            return desk.reward()
        messages.append({"role": "user", "content": reply})
    return 0.0
