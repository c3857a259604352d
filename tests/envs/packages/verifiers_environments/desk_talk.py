"""The order desk as people write it for verifiers: tools of a server, a customer in `run`, a reward at the end."""

import verifiers.v1 as vf
from pydantic import Field

from openai_agent.agent import DESCRIPTIONS, SYSTEM, Desk
from order_desk.data import make_desk_row


class DeskState(vf.State):
    orders: dict = Field(default_factory=dict)
    status: dict = Field(default_factory=dict)


class DeskTools(vf.Toolset[vf.SharedToolsetConfig, DeskState]):
    TOOL_PREFIX = None

    def _call(self, name, order):
        desk = Desk({"customer": "", "orders": self.state.orders, "wishes": []})
        desk.status = dict(self.state.status)
        answer = desk.call(name, order)
        self.state.status = desk.status
        return answer


def _tool(name, place):
    async def tool(self, order: str) -> str:
        return self._call(name, order)

    tool.__name__, tool.__doc__, tool.tool_priority = name, DESCRIPTIONS[name], -place
    return vf.tool(tool)


for _place, _name in enumerate(DESCRIPTIONS):
    setattr(DeskTools, _name, _tool(_name, _place))


class DeskData(vf.TaskData):
    row: dict


class DeskTask(vf.Task[DeskData, DeskState, vf.TaskConfig]):
    async def setup(self, trace, runtime):
        """Show the orders to the tools."""
        desk = Desk(self.data.row)
        trace.state = DeskState(orders=desk.orders, status=desk.status)


class DeskTaskset(vf.Taskset[DeskTask, vf.TasksetConfig]):
    def load(self):
        """The held-out customers."""
        for i in range(32):
            row = make_desk_row("heldout", i)
            yield DeskTask(DeskData(row=row, prompt=Desk(row).opening(), system_prompt=SYSTEM), self.config.task)

    @classmethod
    def toolsets(cls, config):
        """One server for all episodes."""
        return [DeskTools(vf.SharedToolsetConfig())]


class DeskConfig(vf.EnvConfig):
    clerk: vf.AgentConfig = vf.AgentConfig(harness={"id": "word_talk"})


class DeskEnv(vf.Env[DeskConfig]):
    async def run(self, task, agents):
        """Play the customer."""
        desk = Desk(task.data.row)
        async with agents.clerk.interaction(task) as talk:
            segment = await talk.turn()
            while not segment.terminated:
                reply = desk.hear(segment.last_reply)
                if reply is None:
                    break
                segment = await talk.turn(reply)
            desk.status = dict(talk.trace.state.status)
        talk.trace.record_reward("right", desk.reward() if not segment.terminated else 0.0, 1.0)


__all__ = ["DeskEnv", "DeskTaskset"]

if __name__ == "__main__":
    DeskTools.run()
