"""`/apply-template` of llama.cpp's server: a chat as the model's template writes it, for `/completion`."""

from typing import Annotated

from pydantic import Field
from starlette.responses import Response

from spike_export.artifacts.errors import EngineError
from spike_export.serving.openai.chat import Message, Tool, plain_chat
from spike_export.serving.openai.errors import refused
from spike_export.serving.openai.exchange import JsonAnswer
from spike_export.serving.openai.form import MOST_MESSAGES, Form
from spike_export.serving.openai.requests import require_model
from spike_export.serving.service import Service


class TemplateForm(Form):
    """The body of a request.

    Attributes:
        add_generation_prompt: Whether the beginning of the model's answer stands at the end.
    """

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1), MOST_MESSAGES]
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_generation_prompt: bool = True


class Template:
    """The endpoint."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def apply(self, form: TemplateForm) -> Response:
        """Return the text of a chat, nothing is generated."""
        require_model(self._service, form.model)
        chat, prompts = plain_chat(form.messages), self._service.model.prompts
        tools = [tool.model_dump(exclude_none=True) for tool in form.tools or ()]
        try:
            text = await self._service.off_loop(lambda: prompts.render(chat, tools, asks=form.add_generation_prompt))
        except EngineError as error:
            raise refused(error, "messages") from error
        return JsonAnswer({"prompt": text})
