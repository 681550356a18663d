"""`demo`: an app in the browser that samples a model, by Gradio; here, and as the Space that `push --space` writes.

    app = build_app("runs/quickstart")  # a file, a run folder, or user/repo on the Hub
    app.launch()

The picture of a class and a seed is that of `alphaflow sample`. Needs the extra `demo`.
"""

import socket
import time
from importlib.util import find_spec
from typing import Any

from alphaflow_cli.api import Model, load
from alphaflow_cli.errors import AlphaflowError, pip_install

HOST = "127.0.0.1"  # nobody else can reach it
MOST_PICTURES, COLUMNS = 16, 4
LARGEST_SEED = 2**31 - 1
ANY_CLASS = "one drawn per seed"
ENLARGED_TO = 192  # pixels: smaller pictures are shown enlarged, pixel by pixel


def check_gradio() -> None:
    """Refuse in one line when the package of the extra is missing."""
    if find_spec("gradio") is None:
        raise AlphaflowError(f"demo: gradio is not installed. Run: {pip_install('demo')}")


def check_port(port: int) -> None:
    """Refuse a port that another program listens on: Gradio would say so in a traceback, when all is loaded."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just given up is free
        try:
            probe.bind((HOST, port))
        except OSError as fault:
            why = fault.strerror or fault
            raise AlphaflowError(f"demo: port {port} cannot be used ({why}). Choose another one with --port") from fault


def build_app(address: str, *, device: str | None = None) -> Any:
    """The app of a model as gradio.Blocks, loaded and ready to launch."""
    check_gradio()
    import gradio

    model = load(address, device=device)
    names = model.classes

    def draw(label: float, seed: float, steps: float, count: float) -> tuple[list[Any], str]:
        began = time.perf_counter()
        pictures = _pictures(model, int(label), int(seed or 0), int(steps), int(count))
        took = (time.perf_counter() - began) * 1000
        return pictures, f"{took:,.0f} ms for {len(pictures)} on {model.device}"

    with gradio.Blocks(title=model.recipe.name, analytics_enabled=False) as app:
        gradio.Markdown(f"# {model.recipe.name or 'Pictures in one step'}\n{_about(model)}")
        with gradio.Row():
            choices = [(ANY_CLASS, -1), *((name, label) for label, name in enumerate(names))]
            chosen = gradio.Dropdown(choices, value=-1, label="Class", visible=bool(names))
            seed = gradio.Number(0, precision=0, minimum=0, maximum=LARGEST_SEED, label="First seed")
            steps = gradio.Radio([1, 2], value=1, label="Steps")
            count = gradio.Slider(1, MOST_PICTURES, value=8, step=1, label="Pictures")
        button = gradio.Button("Draw", variant="primary")
        gallery = gradio.Gallery(label="Pictures", columns=COLUMNS, format="png", object_fit="contain")
        took = gradio.Markdown()
        inputs = [chosen, seed, steps, count]
        button.click(draw, inputs, [gallery, took], api_name="draw")
        app.load(draw, inputs, [gallery, took], api_name=False)
    return app


def _pictures(model: Model, label: int, seed: int, steps: int, count: int) -> list[tuple[Any, str]]:
    """The pictures of some seeds with their captions; small ones are enlarged."""
    import gradio

    known = -1 <= label < len(model.classes)
    if not (known and 0 <= seed <= LARGEST_SEED and 1 <= count <= MOST_PICTURES and steps in (1, 2)):
        raise gradio.Error("A seed is a whole number from 0; there are 1 to 16 pictures, of 1 or 2 steps, of a class.")
    try:
        drawn = model.sample(seeds=range(seed, seed + count), classes=None if label < 0 else label, nfe=steps)
    except AlphaflowError as fault:
        raise gradio.Error(str(fault)) from fault
    side = drawn.tensor.shape[-1]
    larger = side * max(1, ENLARGED_TO // side)
    shown = []
    for image, each, name in zip(drawn, drawn.seeds, drawn.names, strict=True):
        enlarged = image.resize((larger, larger), resample=0)  # 0: the nearest pixel
        shown.append((enlarged, f"seed {each}, {name}" if name else f"seed {each}"))
    return shown


def _about(model: Model) -> str:
    size = model.recipe.data.image_size
    return f"A one-step image generator, {size} × {size} pixels. The picture of a seed and a class is always the same."
