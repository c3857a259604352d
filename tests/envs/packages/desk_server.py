"""The order desk as an MCP server over HTTP: the clerk's five tools, and two of which the clerk knows nothing; `PORT`."""

import sys

from mcp.server.mcpserver import Context, MCPServer

from openai_agent.agent import DESCRIPTIONS, SYSTEM, Desk

server = MCPServer("order desk", instructions=SYSTEM)
desks = {}


def desk_of(context):
    return desks[context.headers["mcp-session-id"]]


@server.tool()
def begin(context: Context, customer: str, orders: dict, wishes: list) -> str:
    """Open the desk; what the customer says first."""
    desks[context.headers["mcp-session-id"]] = desk = Desk({"customer": customer, "orders": orders, "wishes": wishes})
    return desk.opening()


@server.tool()
def judge(context: Context, message: str) -> str:
    """Tell the customer how it ended; the reward."""
    desk = desk_of(context)
    desk.hear(message)
    return str(desk.reward())


def tool(name):
    def call(context: Context, order: str) -> str:
        return desk_of(context).call(name, order)

    return call


for name, description in DESCRIPTIONS.items():
    server.add_tool(tool(name), name=name, description=description)

if __name__ == "__main__":
    server.run("streamable-http", port=int(sys.argv[1]))
