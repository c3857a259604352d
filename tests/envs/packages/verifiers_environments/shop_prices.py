"""Questions about prices, with a tool: a plain taskset of verifiers, which is played by one agent."""

import verifiers.v1 as vf

PRICES = {"lamp": 7, "door": 30, "rope": 4}


class ShopTools(vf.Toolset[vf.SharedToolsetConfig, vf.State]):
    TOOL_PREFIX = "shop"

    @vf.tool
    async def price(self, item: str) -> str:
        """The price of an item."""
        return str(PRICES[item])


class PriceData(vf.TaskData):
    answer: int


class PriceTask(vf.Task[PriceData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def right(self, trace) -> float:
        """Whether the last message is the price."""
        return float(trace.last_reply.strip() == str(self.data.answer))


class PriceTaskset(vf.Taskset[PriceTask, vf.TasksetConfig]):
    def load(self):
        """One question for each item."""
        for item, price in PRICES.items():
            yield PriceTask(PriceData(prompt=f"what is the price of a {item} ?", answer=price), self.config.task)

    @classmethod
    def toolsets(cls, config):
        """One server for all episodes."""
        return [ShopTools(vf.SharedToolsetConfig())]


__all__ = ["PriceTaskset"]

if __name__ == "__main__":
    ShopTools.run()
