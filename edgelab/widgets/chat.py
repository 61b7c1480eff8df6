"""The chat box: talk to a recipe on a runtime, and see its rate while it writes."""

import html
from collections.abc import Sequence

import ipywidgets
from transformers import PreTrainedTokenizerBase

from edgelab import reference, runtimes
from edgelab.errors import EdgeLabError
from edgelab.recipes import parse
from edgelab.runtimes.session import Session
from edgelab.runtimes.streaming import stream
from edgelab.storage import variants

LIMIT = 128  # tokens of an answer
SMALL = "quantize.rtn:bits=4 + quantize.embedding"
RECIPES = ("none", SMALL, f"{SMALL} @ onnxruntime", f"{SMALL} @ llamacpp")


def chat_box(
    recipes: Sequence[str] = RECIPES, model: str = reference.EMBEDDED, seed: int = 0
) -> ipywidgets.VBox:
    """Choose a recipe and its runtime, write a line, and read the answer as it comes.

    The variant is made and its engine's file written when it is first talked to. The conversation starts anew with
    another recipe: what one model has said is no fair beginning for the next.
    """
    source = reference.resolve(model)
    tokenizer = reference.load_tokenizer(source)
    loaded: dict[str, tuple[Session, PreTrainedTokenizerBase]] = {}  # at most one
    messages: list[dict[str, str]] = []
    wide = {"style": {"description_width": "60px"}, "layout": {"width": "auto", "max_width": "640px"}}
    recipe = ipywidgets.Dropdown(options=list(recipes), description="Recipe", **wide)
    line = ipywidgets.Text(placeholder="Write a line, press Enter", description="You", **wide)
    send = ipywidgets.Button(description="Send", button_style="primary")
    rate = ipywidgets.Label()
    talk = ipywidgets.HTML()

    def ready() -> tuple[Session, PreTrainedTokenizerBase]:
        if recipe.value not in loaded:
            for old in list(loaded):
                loaded.pop(old)[0].close()
            rate.value = "loading …"
            asked = parse(recipe.value)
            folder = variants.build(asked, source, seed, lambda done, total: None)
            session = runtimes.load(asked.runtime, folder)
            loaded[recipe.value] = session, variants.load_own_tokenizer(folder) or tokenizer
        return loaded[recipe.value]

    def answer(_: object) -> None:
        if not line.value.strip() or send.disabled:
            return
        send.disabled = True
        messages.append({"role": "user", "content": line.value.strip()})
        line.value = ""
        said = {"role": "assistant", "content": ""}
        talk.value = conversation_html(messages)
        try:
            session, its_tokenizer = ready()
            for piece in stream(session, its_tokenizer, messages, LIMIT):
                said["content"] += piece.text
                talk.value = conversation_html([*messages, said])
                rate.value = rate_text(session.kernel, piece.tokens, piece.tok_s)
            messages.append(said)
        except EdgeLabError as error:
            messages.pop()
            talk.value, rate.value = conversation_html(messages), str(error)
        finally:
            send.disabled = False

    def start_anew(_: object) -> None:
        messages.clear()
        talk.value = rate.value = ""

    send.on_click(answer)
    line.on_msg(lambda _, content, buffers: answer(None) if content.get("event") == "submit" else None)
    recipe.observe(start_anew, "value")
    return ipywidgets.VBox([recipe, talk, line, ipywidgets.HBox([send, rate])])


def rate_text(kernel: str, tokens: int, tok_s: float | None) -> str:
    """What the label next to the button says while the model writes."""
    return f"{tokens} tokens" + (f", {tok_s:.1f} tokens/s" if tok_s else "") + f" · {kernel}"


def conversation_html(messages: Sequence[dict[str, str]]) -> str:
    """HTML: one paragraph a message, what a model writes escaped."""
    names = {"user": "You", "assistant": "Model", "system": "System"}
    said = (
        f"<p><b>{names[message['role']]}</b><br>{html.escape(message['content']).replace(chr(10), '<br>')}</p>"
        for message in messages
    )
    return "".join(said)
