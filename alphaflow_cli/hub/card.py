"""What a published model says of itself: its card (README.md), without anything of this machine.

The card says what the model is, how to sample it, how it was trained, what it scored and by which protocol, and what to
know. `scrub` goes over everything that is published: paths become their last part, addresses lose their passwords,
wherever they stand.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaflow_cli.evaluate.results import best_founded, row_of, value_text
from alphaflow_cli.recipe import Recipe, dump_recipe
from alphaflow_cli.recipe.plan import draws_scale, effective_scale, has_null_label, is_guided, needs_many_steps
from alphaflow_cli.text import code_span, counted, for_markdown, for_terminal

PAPER = "arXiv:2510.20771"
MEANFLOW = "arXiv:2505.13447"
ARXIV = [f"arxiv:{each[6:]}" for each in (PAPER, MEANFLOW)]  # tags that link the model to the papers' pages
PACKAGE = "https://pypi.org/project/alphaflow-cli/"
UNCONDITIONAL = "unconditional-image-generation"  # a task of the Hub
FEW_CLASSES, MOST_CLASSES = 20, 2000  # names listed at once, and behind a fold
CITATION = """\
@article{zhang2025alphaflow,
  title   = {AlphaFlow: Understanding and Improving MeanFlow Models},
  author  = {Zhang, Huijie and Siarohin, Aliaksandr and Menapace, Willi and Vasilkovsky, Michael and
             Tulyakov, Sergey and Qu, Qing and Skorokhodov, Ivan},
  journal = {arXiv preprint arXiv:2510.20771},
  year    = {2025}
}"""
# Not inside a word, an address (https://a/b) or a tag; C:\x, D:/x, \\server\share\x, file:///x, ~/x, ../x, //x and /x.
# A folder's name may hold spaces and brackets: what stands between two separators belongs to the path.
LOCAL_PATH = re.compile(
    r"(?<![\w/.<>\\])(?:file://+|~[\w.-]{0,64}[/\\]|~|\.{1,2}[/\\]|[A-Za-z]:[\\/](?!/)|\\\\(?=\w)|(?<!:)//+(?=[\w.])|/(?=[\w.]))"
    r"(?:[^/\\\n\":|]{1,80}[/\\]+)*[^\s\"',;:()/\\]*"
)
# More folders than a name on the Hub has.
DEEP_PATH = re.compile(r"(?<![\w/:.@-])[\w.-]+(?:/[\w. -]*[\w.-]){3,}(?![\w/])")
URL = re.compile(r"(?<![\w+])((?!hf:)[a-z][a-z0-9+.-]{1,20}://)([^\s\"'<>]*)", re.IGNORECASE)
SECRET = re.compile(r"\b(hf_|ghp_|sk-|AKIA)[A-Za-z0-9_-]{12,}")  # tokens of the Hub and its neighbours
UNSCRUBBED = "class_names"  # words of the data set, though one may begin with a slash: /m/01g317


@dataclass(frozen=True)
class CardFacts:
    """What the card is written from."""

    repo: str
    recipe: Recipe
    origin: dict[str, Any]
    parameters: int
    results: dict[str, Any] | None  # results.json
    licence: str  # of the weights, an id the Hub knows
    chosen: str = ""  # by which score the checkpoint was chosen of its run, if it was
    pipeline: bool = False  # whether a pipeline for diffusers lies beside the weights

    @property
    def name(self) -> str:
        """The model's name: its repository's, without the user's."""
        return self.repo.rpartition("/")[2]

    @property
    def unfinished(self) -> str:
        """`step 400 of 850` where the training has not reached its last step; else nothing."""
        step, steps = self.origin.get("step"), self.recipe.train.steps
        if not isinstance(step, int) or step >= steps or self.origin.get("converted"):
            return ""
        return f"step {step:,} of {steps:,}"


def model_card(facts: CardFacts) -> str:
    """Write the repository's README.md, section by section."""
    parts = [
        _metadata(facts),
        _what(facts),
        _usage(facts),
        _elsewhere(facts),
        _classes(facts),
        _training(facts),
        _results(facts),
        _caveats(facts),
        _ending(facts),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def result_rows(results: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The numbers of a results.json, from all of its evaluations: of each the best-founded one."""
    return best_founded([row for each in (results or {}).get("evaluations", []) for row in each.get("rows", [])])


def protocol(row: dict[str, Any]) -> str:
    """Write in one line how a number was made, as `eval` does, with what must be known before believing it."""
    number = row_of(row)
    return for_terminal("; ".join([number.protocol(), *number.notes]), limit=2000)


def _metadata(facts: CardFacts) -> str:
    """The YAML head, which the Hub reads; the scores stand in it as evaluation results."""
    from huggingface_hub import EvalResult, ModelCardData

    data = facts.recipe.data
    dataset = for_terminal(data.source.split(":")[0]) or ("imagenet-1k" if data.classes == 1000 else "custom")
    chosen = data.classes > 1  # one class is nothing to choose
    task = "class-conditional-image-generation" if chosen else UNCONDITIONAL
    scores = [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " "),
            dataset_type=dataset,
            dataset_name=for_terminal((row.get("reference") or {}).get("name") or dataset),
            metric_type=str(row["metric"]),
            metric_name=for_terminal(row["name"]),
            metric_value=row["value"],
            metric_args={"protocol": protocol(row)},
        )
        for row in result_rows(facts.results)
    ]
    pipeline = ["diffusers"] if facts.pipeline else []
    head = ModelCardData(
        license=facts.licence,
        library_name="alphaflow",
        pipeline_tag=None if chosen else UNCONDITIONAL,  # the Hub has no task for generation by class
        tags=["alphaflow", "meanflow", "flow-matching", "one-step-generation", task, *ARXIV, *pipeline],
        datasets=re.findall(r"^hf://datasets/([\w.-]+/[\w.-]+)", data.source) or None,
        base_model=_base_model(facts.origin),
        model_name=facts.name,
        eval_results=scores or None,
    )
    return f"---\n{head.to_yaml()}\n---"


def _what(facts: CardFacts) -> str:
    recipe, data = facts.recipe, facts.recipe.data
    labels = counted(data.classes, "class", "classes") if data.classes else "no labels"
    space = (
        "pixels"
        if data.autoencoder == "none"
        else f"latents {data.channels}x{data.latent_size}x{data.latent_size} of {_autoencoder(data.autoencoder)}"
    )
    nfe = recipe.sample.nfe
    evaluations = "one evaluation" if nfe == 1 else f"{nfe} evaluations"
    lines = [
        f"# {for_markdown(facts.name)}",
        "",
        f"An image generator that needs {evaluations} of its network per picture: "
        f"{data.image_size} px, {labels}, {facts.parameters:,} parameters, working on {space}. "
        f"It predicts the average velocity u(z, r, t) of [MeanFlow](https://arxiv.org/abs/{MEANFLOW[6:]}) and "
        f"[α-Flow](https://arxiv.org/abs/{PAPER[6:]}); "
        f"the weights are {_weights(facts.origin)}.",
    ]
    if facts.unfinished:
        lines += ["", f"**The training is not finished: these are the weights of {facts.unfinished}.**"]
    lines += ["", "![Samples](samples.png)", "", "Uncurated: consecutive seeds."]
    return "\n".join(lines)


def _autoencoder(name: str) -> str:
    """The autoencoder's name, as a link where it is one of the Hub's."""
    known = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)
    return f"[{for_markdown(name)}](https://huggingface.co/{name})" if known else for_markdown(name)


def _weights(origin: dict[str, Any]) -> str:
    kind = "the exponential average" if origin.get("weights") == "ema" else "the raw ones, not averaged,"
    step = origin.get("step")
    return f"{kind} at step {step:,}" if isinstance(step, int) else kind.rstrip(",")


def _usage(facts: CardFacts) -> str:
    repo, sample = facts.repo, facts.recipe.sample
    chosen = '  # classes=["…"] chooses; print(model) says what there is' if facts.recipe.data.classes > 1 else ""
    return f"""\
## Sample

With [alphaflow]({PACKAGE}), the program that wrote this card:

```bash
pip install alphaflow-cli
alphaflow sample {repo} --seeds 0-15 --nfe {sample.nfe} --grid samples.png
alphaflow sample {repo} --seeds 0-15 --nfe {sample.nfe} --out pictures
```

```python
import alphaflow_cli

model = alphaflow_cli.load("{repo}")
pictures = model.sample(8, nfe={sample.nfe}){chosen}
pictures.save("grid.png")
```

The picture of a seed is the same on every machine up to rounding, whatever the batch. Pin a revision with
`{repo}@COMMIT`."""


def _base_model(origin: dict[str, Any]) -> str | None:
    """The model on the Hub whose weights the training began with."""
    begun = re.match(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:[@:]|$)", str(origin.get("init_from") or ""), re.ASCII)
    return begun[1] if begun else None


def _elsewhere(facts: CardFacts) -> str:
    """How other programs run it: ONNX Runtime, and diffusers where its pipeline lies beside the weights."""
    repo, nfe, some = facts.repo, facts.recipe.sample.nfe, facts.recipe.data.classes > 0
    text = f"""\
## In other programs

One ONNX graph, from noise and class to the picture; `--to web` writes a page that runs it in a browser:

```shell
pip install 'alphaflow-cli[onnx]'
alphaflow export {repo} --to onnx -o model.onnx
```"""
    if not facts.pipeline:
        return text
    which = "class_labels=[0]" if some else "num_images=1"
    return f"""{text}

A pipeline for diffusers, whose code lies in this repository:

```py
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo}", trust_remote_code=True)
seeds = [torch.Generator().manual_seed(0)]
pipe({which}, num_inference_steps={nfe}, generator=seeds).images[0].save("picture.png")
```"""


def _classes(facts: CardFacts) -> str:
    """The classes by number; of many, behind a fold; none where nobody knows their names."""
    names = [str(name) for name in facts.origin.get("class_names") or []][: facts.recipe.data.classes]
    if not names:
        return ""
    if facts.recipe.data.classes == 1:
        return f"## Classes\n\nAll pictures are of one class: {for_markdown(names[0])}."
    rest = f", and {len(names) - MOST_CLASSES:,} more" if len(names) > MOST_CLASSES else ""
    listed = ", ".join(f"{i} {for_markdown(name)}" for i, name in enumerate(names[:MOST_CLASSES])) + rest
    ways = 'Choose them by number or by name: `--classes 0`, `classes=[0]`, `--classes NAME`, `classes=["NAME"]`.'
    if len(names) <= FEW_CLASSES:
        return f"## Classes\n\n{listed}.\n\n{ways}"
    return f"## Classes\n\n{ways}\n\n<details><summary>All {len(names):,} names</summary>\n\n{listed}.\n\n</details>"


def _training(facts: CardFacts) -> str:
    recipe, origin = facts.recipe, facts.origin
    lines = ["## Training", ""]
    if origin.get("converted"):
        lines += [_conversion(origin["converted"]), ""]
    else:
        seen = origin.get("images_seen")
        named = f" Recipe {code_span(recipe.name)}:" if recipe.name else ""
        planned = f"{recipe.train.steps:,} steps of {recipe.train.batch:,} pictures"
        ended = f", of which this is {facts.unfinished}" if facts.unfinished else ""
        lines += [f"{_again(recipe)}.{named} {planned}{ended}"]
        lines[-1] += f"; {seen:,} pictures seen" if isinstance(seen, int) else ""
        lines[-1] += f", from {code_span(recipe.data.source)}." if recipe.data.source else "."
        chosen = [f"These weights are {for_markdown(facts.chosen)}."] if facts.chosen else []
        lines += [_objective(recipe), *chosen, ""]
    lines += ["![alpha, the share of r = t rows and the learning rate over the steps](alpha.png)", ""]
    lines += ["<details><summary>The whole recipe</summary>", "", *_fenced(dump_recipe(recipe), "yaml"), ""]
    lines += ["</details>"]
    return "\n".join(lines)


def _again(recipe: Recipe) -> str:
    """The command that trains the model again by the recipe that is published beside it."""
    return "`alphaflow train recipe.yaml" + ("`" if recipe.data.source else " --data DIR` ([recipe](recipe.yaml))")


def _fenced(text: str, kind: str) -> list[str]:
    """Write text as code, between fences longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{kind}", for_terminal(text.rstrip(), limit=100_000, lines=True), fence]


def _objective(recipe: Recipe) -> str:
    alpha = recipe.alpha
    if alpha.kind == "constant":
        name = {1.0: "(trajectory) flow matching", 0.0: "MeanFlow"}.get(alpha.initial, "a fixed mixture")
        return f"alpha is {alpha.initial:g} throughout: {name}."
    return f"alpha goes from {alpha.initial:g} to {alpha.final:g} ({alpha.kind}, from {alpha.start} to {alpha.end})."


def _conversion(converted: dict[str, Any]) -> str:
    filled = "\n".join(
        f"- {for_markdown(key)}: {for_markdown(value)}" for key, value in (converted.get("filled") or {}).items()
    )
    return (
        f"Converted from {code_span(converted.get('file'))} ({for_markdown(converted.get('from'))}, sha256 "
        f"{code_span(str(converted.get('sha256'))[:16])}), not trained here. What that file does not say:\n\n{filled}"
    )


def _results(facts: CardFacts) -> str:
    rows = result_rows(facts.results)
    if not rows:
        return "## Results\n\nNot measured yet: `alphaflow eval " + facts.repo + "`."
    lines = ["## Results", "", "| metric | value | protocol |", "|---|---|---|"]
    for row in rows:
        cells = for_markdown(row["name"]), value_text(row_of(row)), for_markdown(protocol(row), limit=2000)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "A number means its protocol: compare only where all of it is the same."])


def _caveats(facts: CardFacts) -> str:
    recipe, mix = facts.recipe, facts.recipe.guidance
    lines = ["## Good to know", ""]
    if draws_scale(recipe):
        lines += [_guide_line(recipe)]
    elif is_guided(mix.omega, mix.kappa):
        scale = effective_scale(mix.omega, mix.kappa)
        lines += [f"- Guidance of scale {scale:g} is built into the weights; sample with guidance 1 (the default)."]
    elif has_null_label(recipe):
        lines += ["- Trained without guidance, with a null label: `--guidance 1.5` and the like work when sampling."]
    if needs_many_steps(recipe):
        lines += [f"- A plain velocity field: it needs many steps ({recipe.sample.sampler}, {recipe.sample.nfe} here)."]
    if recipe.data.autoencoder != "none":
        lines += [
            f"- Latents are decoded by {code_span(recipe.data.autoencoder)}; another autoencoder gives other pictures."
        ]
    what = "Pixels" if recipe.data.autoencoder == "none" else "Latents"
    lines += [
        f"- {what} are normalised by the mean and standard deviation stored with the weights.",
        "- It reproduces what it was trained on, with its gaps and biases; there is no safety filter.",
    ]
    return "\n".join(lines)


def _guide_line(recipe: Recipe) -> str:
    """How a model is guided that takes the scale, and perhaps the interval, as inputs."""
    sample, drawn = recipe.sample, recipe.guidance.interval == "drawn"
    low, high = sample.interval or (0.0, 1.0)
    option = f"--guidance {sample.scale or 1.0:g}" + (f" --interval {low:g},{high:g}" if drawn else "")
    return f"- Guidance is an input, at no cost: `{option}` is the default; scales from 1 (none) up work."


def _ending(facts: CardFacts) -> str:
    made = ", ".join(f"{name} {value}" for name, value in (facts.origin.get("versions") or {}).items())
    licence = "the publisher has not named a licence" if facts.licence == "unknown" else facts.licence
    of = "The data have" if facts.recipe.data.autoencoder == "none" else "The data and the autoencoder have"
    text = f"""\
## Licence and citation

Weights: {licence}. {of} terms of their own. The method:

```bibtex
{CITATION}
```"""
    return text + (f"\n\nMade with {for_markdown(made)}." if made else "")


def scrub(value: Any) -> Any:
    """Remove every path and password of this machine, wherever it stands in a tree of plain values."""
    if isinstance(value, dict):
        return {scrub(key): item if key == UNSCRUBBED else scrub(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~")) and "\n" not in value:
        return Path(value).name
    for known in sorted({str(Path.home()), str(Path.cwd())} - {"/"}, key=len, reverse=True):
        value = value.replace(f"file://{known}/", "").replace(f"{known}/", "")
    value = SECRET.sub(lambda match: f"{match[1]}…", URL.sub(_without_password, value))
    return DEEP_PATH.sub(_last, LOCAL_PATH.sub(_last, value))


def last_part(place: str) -> str:
    """Shorten what is known to be a path or an address: a path, absolute or not, becomes its last part."""
    return scrub(place) if "://" in place else Path(place.replace("\\", "/")).name or place.strip("./~")


def _last(match: re.Match[str]) -> str:
    return re.split(r"[/\\]", match[0].rstrip("/\\"))[-1].strip()


def _without_password(match: re.Match[str]) -> str:
    """scheme://user:password@host/path?key=… → scheme://host/path; what follows an @ in a path stays."""
    scheme, rest = match[1], re.split(r"[?#]", match[2], maxsplit=1)[0]
    user = re.match(r"[^/@]*@|[^/@:]*:(?!\d+(?:/|$))[^@]*@", rest)  # a password with a slash is no port
    if scheme.lower() == "file://":
        return match[0]
    return scheme + (rest[user.end() :] if user else rest)
