"""Our weights' names and the published system's: a pure renaming, both ways."""

PUBLISHED = {
    "pos_embed": "pos_embed",
    "patch_embed.proj.": "x_embedder.proj.",
    "time_embed.mlp.": "noise_labels_embedder.mlp.",
    "second_embed.mlp.": "noise_labels_next_embedder.mlp.",
    "label_embed.weight": "y_embedder.embedding_table.weight",
    "blocks.": "blocks.",
    "final.linear.": "final_layer.linear.",
    "final.modulation.linear.": "final_layer.adaLN_modulation.1.",
}
MODULATION = (".modulation.linear.", ".adaLN_modulation.1.")  # inside a block


def to_published(name: str) -> str:
    """`blocks.0.modulation.linear.bias` → `blocks.0.adaLN_modulation.1.bias`."""
    return _rename(name, PUBLISHED, *MODULATION)


def from_published(name: str) -> str:
    """The way back."""
    return _rename(name, {theirs: ours for ours, theirs in PUBLISHED.items()}, *reversed(MODULATION))


def _rename(name: str, prefixes: dict[str, str], old: str, new: str) -> str:
    for ours, theirs in prefixes.items():
        if name.startswith(ours):
            rest = name[len(ours) :]
            return theirs + (rest.replace(old[1:], new[1:]) if ours == "blocks." else rest)
    raise KeyError(name)
