"""The order desk as a plain agent program: it talks to a chat-completions server, and knows nothing of who trains its model.

    agent(base_url, api_key, row) -> reward

The model has five tools and a customer, who is scripted. The reward is 1 if every order is as the policy would leave it, and
the customer was told the right words; else 0. `python agent.py` serves one customer, whose row is on standard input, with the
server that OPENAI_BASE_URL names.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys

from openai import AsyncOpenAI, DefaultAioHttpClient

SYSTEM = (
    "order desk . cancel if pending . transfer if shipped . refund if delivered within 30 days , never food . else say why ."
)
OUTCOMES = {"cancelled", "refunded", "transferred", "pending", "shipped", "delivered", "expired", "food"}
FOOD = {"bread", "cheese", "honey", "milk"}
CHANGES = {"cancel": "cancelled", "refund": "refunded", "transfer": "transferred"}
DESCRIPTIONS = {
    "status": "The status of an order: pending, shipped or delivered.",
    "age": "How many days ago an order was delivered.",
    "cancel": "Cancel an order.",
    "refund": "Take an order back and refund it.",
    "transfer": "Hand an order over to a person.",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"order": {"type": "string"}}, "required": ["order"]},
        },
    }
    for name, description in DESCRIPTIONS.items()
]
LATENCY_S = 0.2  # mean, of a tool and of the customer

http = DefaultAioHttpClient(timeout=600)  # shared by all episodes; of many at a time it takes half the CPU of the default one


async def agent(base_url: str, api_key: str, row: dict) -> float:
    """Serve one customer."""
    client = AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=http, max_retries=0)
    desk = Desk(row)
    messages: list[dict] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": desk.opening()}]
    for _ in range(16):
        completion = await client.chat.completions.create(model="policy", messages=messages, tools=TOOLS)
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if completion.choices[0].finish_reason == "length":
            return 0.0
        await asyncio.sleep(random.expovariate(1 / LATENCY_S))
        if message.tool_calls:
            for call in message.tool_calls:
                result = desk.call(call.function.name, **json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            continue
        reply = desk.hear(message.content or "")
        if reply is None:
            return desk.reward()
        messages.append({"role": "user", "content": reply})
    return 0.0


class Desk:
    """Orders, and a customer with one or two wishes."""

    def __init__(self, row: dict) -> None:
        self.customer, self.orders, self.wishes = row["customer"], row["orders"], row["wishes"]
        self.status = {number: order["status"] for number, order in self.orders.items()}
        self.told: list[str] = []
        self.asked = self.complains = False

    def opening(self) -> str:
        """Return what the customer says first."""
        return f"{self.customer} here : {self.wish()}"

    def wish(self) -> str:
        """Return the customer's next wish in words."""
        wish = self.wishes[len(self.told)]
        text = f"please {wish['kind']} my {self.orders[wish['order']]['item']} order"
        return text if wish["withheld"] else f"{text} {wish['order']}"

    def call(self, name: str, order: str = "") -> str:
        """Run a tool."""
        if order not in self.orders:
            return "no such order"
        if name == "status":
            return self.status[order]
        if name == "age":
            days = self.orders[order]["days"]
            return f"{days} days" if days else "not delivered"
        self.status[order] = CHANGES[name]
        return "ok"

    def hear(self, message: str) -> str | None:
        """Return what the customer answers; None: they leave."""
        words, wish = set(message.split()), self.wishes[len(self.told)]
        if words >= {"which", "order"}:
            self.complains = self.asked or not wish["withheld"]
            self.asked = True
            return None if self.complains else f"it is {wish['order']}"
        outcomes = words & OUTCOMES
        self.complains = len(outcomes) != 1
        if self.complains:
            return None
        self.told.append(outcomes.pop())
        self.asked = False
        return None if len(self.told) == len(self.wishes) else f"thanks , now {self.wish()}"

    def reward(self) -> float:
        """Return 1.0 if everything is as the policy wants it, else 0.0."""
        expected, words = {number: order["status"] for number, order in self.orders.items()}, []
        for wish in self.wishes:
            action, word = ruling(wish["kind"], self.orders[wish["order"]])
            words.append(word)
            expected[wish["order"]] = CHANGES.get(action, expected[wish["order"]])
        return float(not self.complains and self.told == words and self.status == expected)


def ruling(kind: str, order: dict) -> tuple[str, str]:
    """Return what the policy wants: the tool to call, if any, and the word to tell."""
    status = order["status"]
    if kind != "track" and status == "shipped":
        return "transfer", "transferred"
    if kind == "cancel" and status == "pending":
        return "cancel", "cancelled"
    if kind == "refund" and status == "delivered":
        if order["item"] in FOOD:
            return "", "food"
        return ("refund", "refunded") if order["days"] <= 30 else ("", "expired")
    return "", status


async def main(row: dict) -> float:
    """Serve one customer with the server that the environment names."""
    async with http:
        return await agent(os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"], row)


if __name__ == "__main__":
    print(json.dumps({"reward": asyncio.run(main(json.load(sys.stdin)))}))
