"""Recipes, `--set`, metadata of checkpoints and results.json, mutated: one clear line, in time, whatever they hold."""

import json
import re
import struct

import pytest
from fuzzing import CONTROL, JSON, NUMBERS, TEXTS, YAML, Trial, fuzz, mutate_bytes, mutate_json, mutate_recipe, write
from hub_fixtures import RECIPE, results_of, sha256, write_checkpoint

from alphaflow_cli.recipe import dump_recipe, load_recipe, recipe_from_text, shipped
from alphaflow_cli.recipe.loader import to_dict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600, method="thread")]


def loads_again(path, sets=()):
    """A check: an accepted recipe, written out and read again, is the same one."""

    def check(outcome):
        if outcome.code:
            return ""
        recipe = load_recipe(str(path), sets)
        return (
            ""
            if recipe_from_text(dump_recipe(recipe), "copy") == recipe
            else "a recipe that is another when it is read again"
        )

    return check


# Recipes.

RECIPES = [f"train: {{steps: {number}}}" for number in NUMBERS]
RECIPES += [f"times: {{equal_share: {number}}}" for number in NUMBERS]
RECIPES += [f"alpha: {{kind: linear, end: {number}}}" for number in NUMBERS] + [
    f"optim: {{betas: [{number}, .9]}}" for number in NUMBERS
]
RECIPES += [f"ema: {{half_lives: [{number}]}}" for number in NUMBERS] + [
    f"model: {{dim: {number}}}" for number in NUMBERS
]
RECIPES += [f"name: {json.dumps(text)}" for text in TEXTS] + [f"name: {text}" for text in TEXTS] + YAML + TEXTS
RECIPES += [f"data: {{autoencoder: {json.dumps(text)}, classes: 0}}" for text in TEXTS]
RECIPES += ["".join(f"{key}{i}: 1\n" for i in range(n)) for key in ("k", "steps") for n in (40, 4000, 9000)]
RECIPES += [
    "train:\n" + "".join(f"  step{i}: 1\n" for i in range(4000)),
    "a: 1\n" * 4000,
    "ema: {half_lives: [" + "x, " * 4000 + "1]}",
]
RECIPES += [
    "\n".join("x" * n + ": 1" for n in (60_000,)),
    "train: {steps: " + "x" * 60_000 + "}",
    "ema: {half_lives: [50, 50.0000001]}",
]


def test_recipes(tmp_path):
    sources = [path.read_text() for path in shipped().values()] + [RECIPE]
    path, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"

    def make(rng, number):
        example = number < len(RECIPES)
        write(path, text := RECIPES[number] if example else mutate_recipe(rng, rng.choice(sources)))
        other.unlink(missing_ok=True)
        verb = rng.choice(("check", "check", "check", "show", "show", "json", "plot", "cp"))
        more = {
            "json": ["--json"],
            "plot": ["-o", str(tmp_path / "p.svg")],
            "cp": [str(other), "--set", "train.seed=3"],
        }
        argv = ["recipe", {"json": "show"}.get(verb, verb), str(path), *more.get(verb, [])]
        return Trial(argv, text, check=loads_again(path))

    fuzz("recipes", make, 12_000)


# --set.


def keys():
    sections = to_dict(load_recipe("b2"))
    for name, section in sections.items():
        yield name
        if isinstance(section, dict):
            yield from (f"{name}.{field}" for field in section)
    yield from (
        "alpha",
        "times.equal_share.end",
        "alpha.kind",
        "x.y",
        "model.dim.x",
        "",
        ".",
        "train.",
        ".steps",
        "é",
        "\x1b[2J",
    )


SETS = [f"train.steps={value}" for value in [*NUMBERS, *TEXTS, *YAML]] + [f"alpha.end={value}" for value in NUMBERS]
SETS += [
    *TEXTS,
    *YAML,
    "=",
    "==",
    "a=b=c",
    "train.steps",
    "a." * 3000 + "b=1",
    "model=1",
    "model={}",
    "model.dim={a: 1}",
]


def test_set(tmp_path):
    path = write(tmp_path / "tiny.yaml", RECIPE)
    every = list(keys())

    def make(rng, number):
        if number < len(SETS):
            sets = [SETS[number]]
        else:
            sets = [
                f"{rng.choice(every)}={rng.choice(rng.choice((NUMBERS, NUMBERS, TEXTS, YAML)))}"
                for _ in range(rng.choice((1, 1, 3)))
            ]
            sets = [mutate_recipe(rng, text)[:9000] if rng.random() < 0.1 else text for text in sets]
        sets = [
            text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape").replace("\0", "") for text in sets
        ]
        verb = rng.choice((["check"], ["check"], ["show"], ["show", "--json"]))
        argv = ["recipe", *verb, str(path), *(f"--set={text}" for text in sets)]
        return Trial(argv, repr(sets), check=loads_again(path, sets))

    fuzz("set", make, 8_000)


# What a checkpoint says of itself.


def split(data):
    """A safetensors file: its header, and the bytes after it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def metadata_examples(header, body):
    """(what, header): values of every entry, and kinds of numbers that weights cannot be."""
    told = header["__metadata__"]
    for name in ("format", "recipe", "origin"):
        for value in ["", "\0", "1", "[]", "null", "{}", "[" * 100_000, "9" * 5000, *TEXTS]:
            yield f"{name}={value[:50]!r}", header | {"__metadata__": told | {name: value}}, False
        yield f"no {name}", header | {"__metadata__": {k: v for k, v in told.items() if k != name}}, True
    for count in (4000, 100_000):
        many = told["recipe"] + "".join(f"k{i}: 1\n" for i in range(count))
        yield f"a recipe of {count} keys", header | {"__metadata__": told | {"recipe": many}}, True
    for key, value in json.loads(told["origin"]).items():
        for other in [*JSON, *TEXTS[:12], {"nested": {"deep": [value]}}]:
            origin = json.dumps(json.loads(told["origin"]) | {key: other})
            yield f"origin.{key}={str(other)[:50]}", header | {"__metadata__": told | {"origin": origin}}, False
    for dtype in ("I32", "U32", "F8_E4M3", "BOOL", "C64", "I64", "U8", "XYZ"):
        size = {"I32": 1, "U32": 1, "XYZ": 1, "I64": 2, "C64": 2, "F8_E4M3": 0.25, "BOOL": 0.25, "U8": 0.25}[dtype]
        yield f"weights of {dtype}", retyped(header, dtype, size), True


def retyped(header, dtype, size):
    """All weights of another kind and the same shape, in so many more or fewer bytes."""
    changed, at = {"__metadata__": header["__metadata__"]}, 0
    for name, entry in sorted(
        ((n, e) for n, e in header.items() if n != "__metadata__"), key=lambda pair: pair[1]["data_offsets"]
    ):
        length = entry["data_offsets"][1] - entry["data_offsets"][0]
        new = length if name.startswith("latents.") else int(length * size)
        changed[name] = (
            entry | {"data_offsets": [at, at + new]} | ({} if name.startswith("latents.") else {"dtype": dtype})
        )
        at += new
    return changed


def test_metadata(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, body = split(write_checkpoint(tmp_path / "good.safetensors").read_bytes())
    told, path = header["__metadata__"], tmp_path / "m.safetensors"
    examples = list(metadata_examples(header, body))

    def make(rng, number):
        refused = False
        if number < len(examples):
            what, changed, refused = examples[number]
            end = max(entry["data_offsets"][1] for name, entry in changed.items() if name != "__metadata__")
            data = join(changed, (body * 3)[:end])
        else:
            what, data = mutated_checkpoint(rng, header, told, body)
        path.write_bytes(data)
        verbs = [["sample", str(path), "--seeds", "0", "--grid", "g.png"]] * 8 + [
            ["sample", str(path), "--seeds", "0", "--latents", "l.npy"]
        ]
        verbs += [["push", str(path), "--dry-run", "--out", "hub"]] if number % 8 == 0 else []
        return Trial(rng.choice(verbs), what, refused)

    fuzz("metadata", make, 4_000, cpu=4)


def mutated_checkpoint(rng, header, told, body):
    kind = rng.randrange(6)
    if kind == 0:
        text = mutate_json(rng, header).encode("utf-8", "surrogatepass")
        return text.decode("utf-8", "replace"), join(text, body)
    if kind == 1:
        return "bytes", mutate_bytes(rng, join(header, body)[: rng.choice((64, 4000, 10**9))])
    name = rng.choice(("recipe", "recipe", "origin", "origin", "format"))
    value = mutate_recipe(rng, told[name]) if name != "origin" else mutate_json(rng, json.loads(told[name]))
    value = value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return f"{name}={value}", join(header | {"__metadata__": told | {name: value}}, body)


# results.json.

MARKUP = re.compile(r"<(script|img)\b|\]\(javascript:|^# Heading", re.MULTILINE | re.IGNORECASE)


def test_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    model = write_checkpoint(run / "model.safetensors")
    write(run / "recipe.yaml", RECIPE)
    good = results_of(sha256(model.read_bytes()))
    fields = [(entry, key) for entry in ("row", "space", "pictures", "reference") for key in field_of(good, entry)]
    hostile = [text for text in TEXTS if MARKUP.search(text) or CONTROL.search(text) or "|" in text]
    examples = [(*where, f"x{text}x") for where in fields for text in hostile] + [
        (*where, value) for value in (*JSON, *TEXTS) for where in fields
    ]

    def make(rng, number):
        push = number < len(fields) * len(hostile) // 4 or number % 9 == 0
        if number < len(examples) // 4:
            document = json.loads(json.dumps(good))
            entry, key, value = examples[4 * number]
            field_of(document, entry)[key] = [value] if key == "notes" and isinstance(value, str) else value
            text, what = json.dumps(document), f"{entry}.{key}={str(value)[:80]!r}"
        else:
            text = what = mutate_json(rng, good)
        write(run / "results.json", text)
        argv = ["push", str(run), "--dry-run", "--out", "hub"] if push else ["report", str(run), "-o", "r.html"]
        return Trial(
            argv, what, check=lambda outcome: "" if outcome.code or not push else markup(tmp_path / "hub" / "README.md")
        )

    fuzz("results", make, 2_500, cpu=4)


def field_of(document, entry):
    row = document["evaluations"][0]["rows"][0]
    return row if entry == "row" else row[entry]


def markup(card):
    """A check: nothing of a foreign document is markup in the card."""
    text = card.read_text()
    found = MARKUP.search(text) or CONTROL.search(text)
    return f"{found[0]!r}\nraw markup or control characters in the model card" if found else ""
