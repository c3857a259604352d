"""An environment of verifiers as people write one: a taskset, a conversation, and a harness that runs in this process."""

import verifiers.v1 as vf
from openai import AsyncOpenAI

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
    """Asks for a turn, and calls nothing."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, tool_interception_url=None):
        """Ask for one turn."""
        system, prompt = self.resolve_prompt(data)
        said = (
            [{"role": "user", "content": prompt}]
            if isinstance(prompt, str)
            else [m.model_dump(exclude_none=True) for m in prompt]
        )
        messages = [{"role": "system", "content": system}, *said]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            await client.chat.completions.create(model=ctx.model, messages=messages)
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


__all__ = ["InProcess", "TalkEnv", "WordsTaskset"]
