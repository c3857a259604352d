"""An MCP server of the package's own: counts for each session; `python mcp_server.py [PORT | broken | shapeless]`."""

import json
import os
import sys
import time
from collections import Counter

from mcp.server.mcpserver import Context, MCPServer

server = MCPServer("counter", instructions="Count to seven.")
totals = Counter()


def session_of(context):
    """Over HTTP the id of the session; over standard input and output there is one a process."""
    return (context.headers or {}).get("mcp-session-id", "")


@server.tool()
def begin(context: Context, start: int) -> str:
    """Begin with a number; not for the model."""
    totals[session_of(context)] = start
    return f"you have {start}"


@server.tool()
def add(context: Context, amount: int) -> str:
    """Add a number."""
    totals[session_of(context)] += amount
    return f"total is {totals[session_of(context)]}"


@server.tool()
def total(context: Context) -> str:
    """Return the total; not for the model."""
    return str(totals[session_of(context)])


@server.tool()
def refuse() -> str:
    """Answer with an error."""
    raise ValueError("not today")


@server.tool()
def die() -> str:
    """End the server."""
    print("out of coins", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def hang() -> str:
    """Never answer."""
    time.sleep(1000)
    return ""


@server.tool()
def shout(size: int) -> str:
    """Answer with so many letters."""
    return "a" * size


def serve_shapeless():
    """Speak the protocol by hand, since the package's own server sends no such schema."""
    info = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "odd", "version": "1"}}
    results = {"initialize": info, "tools/list": {"tools": [{"name": "odd", "inputSchema": {"type": "string"}}]}}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["method"] in results:
            print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": results[asked["method"]]}), flush=True)


if __name__ == "__main__":
    if log := os.environ.get("STARTS"):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
    match sys.argv[1:]:
        case []:
            server.run()
        case ["broken"]:
            sys.exit("no coins at all")
        case ["shapeless"]:
            serve_shapeless()
        case [port]:
            server.run("streamable-http", port=int(port))
