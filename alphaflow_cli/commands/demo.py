"""`alphaflow demo`: look at a model in the browser."""

import click

from alphaflow_cli.commands.common import begin, check_checkpoint, checkpoint_argument, device_option, examples
from alphaflow_cli.commands.values import WholeWithin

EPILOG = examples("alphaflow demo runs/quickstart", "alphaflow demo runs/quickstart --port 7861")


@click.command("demo", epilog=EPILOG)
@checkpoint_argument("checkpoint", "CKPT")
@click.option("--port", type=WholeWithin(1, 65535), default=7860, show_default=True, help="Where it is served.")
@device_option
def command(checkpoint: str, port: int, device: str | None) -> None:
    """Serve an app on this machine that samples CKPT: a file, a run folder, or a Hub id user/repo[@revision].

    It listens on 127.0.0.1 only, until it is interrupted. push --space publishes the same app.
    """
    check_checkpoint(checkpoint)
    begin(f"demo {checkpoint}")
    from alphaflow_cli.demo import HOST, build_app, check_gradio, check_port

    check_gradio()
    check_port(port)
    app = build_app(checkpoint, device=device)
    app.launch(server_name=HOST, server_port=port)
