"""An environment of verifiers as people write one: a taskset, a conversation, and a harness that runs in this process."""

import json
from contextlib import AsyncExitStack

import verifiers.v1 as vf
from openai import AsyncOpenAI, omit
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

LOW = {f"w{i}" for i in range(10)}


class WordsData(vf.TaskData):
    num_turns: int


class WordsTask(vf.Task[WordsData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def low(self, trace) -> float:
        """The share of low words among all that was said."""
        said = [word for message in trace.assistant_messages for word in (message.content or "").split()]
        return sum(word in LOW for word in said) / max(len(said), 1)


class WordsConfig(vf.TasksetConfig):
    start: int = 0
    num: int = 10
    num_turns: int = 3


class WordsTaskset(vf.Taskset[WordsTask, WordsConfig]):
    def load(self):
        """Some first words."""
        for i in range(self.config.start, self.config.start + self.config.num):
            data = WordsData(prompt=f"w{i % 20}", system_prompt="w0 w1 w2", num_turns=self.config.num_turns)
            yield WordsTask(data, self.config.task)


class TalkConfig(vf.EnvConfig):
    speaker: vf.AgentConfig = vf.AgentConfig()
    is_fixed: bool = False


class TalkEnv(vf.Env[TalkConfig]):
    async def setup(self, agents):
        """Say who learns."""
        agents.speaker.trainable = not self.config.is_fixed

    async def run(self, task, agents):
        """Answer every message with the same words."""
        async with agents.speaker.interaction(task) as talk:
            segment = await talk.turn()
            for _ in range(task.data.num_turns - 1):
                if segment.terminated:
                    break
                segment = await talk.turn("w3 w4")


class InProcess(vf.Harness[vf.HarnessConfig]):
    """Asks for turns until one calls nothing."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, tool_interception_url=None):
        """Play until the user is to speak."""
        system, prompt = self.resolve_prompt(data)
        said = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else prompt
        messages = [{"role": "system", "content": system}, *map(message_to_wire, said)]
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0, timeout=600))
            urls = {"mcpServers": {name: {"url": url} for name, url in mcp_urls.items()}}
            tools, places, servers = await connect_mcp(urls, stack)
            calls = [None]
            while calls:
                completion = await client.chat.completions.create(model=ctx.model, messages=messages, tools=tools or omit)
                message = completion.choices[0].message
                messages.append(message.model_dump(exclude_none=True))
                calls = message.tool_calls or []
                for call in calls:
                    answer = await call_mcp(servers, places, call.function.name, json.loads(call.function.arguments))
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": answer})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["InProcess", "TalkEnv", "WordsTaskset"]
