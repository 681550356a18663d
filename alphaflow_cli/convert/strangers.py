"""Checkpoints that are met often and cannot be converted: each is named for what it is, in one line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from alphaflow_cli.convert.source import bare_name
from alphaflow_cli.errors import AlphaflowError

JAX_FILES = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "checkpoint", "_sharding")
KNOWN = (
    "Known: the published α-Flow and MeanFlow snapshots, SiT, DiT, REPA, SoFlow, improved MeanFlow, and the PyTorch "
    "MeanFlows of zhuyu-cs and FastGen"
)


def check_path(path: Path) -> None:
    """Refuse a folder or a file that cannot be a checkpoint, by its name alone; nothing is read."""
    if path.is_dir():
        _refuse_folder(path)
    if path.suffix.lower() in (".pkl", ".pickle"):
        raise AlphaflowError(
            f"{path}: a pickle, as EDM's codes and JAX's write: it may hold code, so it is not opened. Save its "
            "weights with torch.save or as safetensors."
        )
    if path.suffix.lower() in (".msgpack", ".npz", ".npy", ".h5", ".tfrecord", ".ckpt-flax"):
        raise AlphaflowError(
            f"{path}: {path.suffix} is no file of PyTorch weights, but of JAX, NumPy or TensorFlow. Save its weights "
            "with torch.save or as safetensors."
        )


def _refuse_folder(path: Path) -> NoReturn:
    names = {entry.name for entry in _entries(path)}
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        raise AlphaflowError(
            f"{path}: a folder of torch.distributed.checkpoint, as FastGen's FSDP runs write. Make one file of it "
            "first: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
        )
    if names & set(JAX_FILES) or any(name.startswith("checkpoint_") for name in names):
        raise AlphaflowError(
            f"{path}: a folder of a JAX code (Flax, Orbax), such as the authors' MeanFlow, iMF and Shortcut. Its "
            "networks are not read; PyTorch checkpoints are."
        )
    raise AlphaflowError(f"{path}: a folder, no such file. Name the .pt or .safetensors checkpoint in it.")


def _entries(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError as error:
        raise AlphaflowError(f"{path}: cannot be listed: {error.strerror}.") from error


def refuse_strangers(tree: dict[str, Any], path: Path, arguments: dict[str, Any]) -> None:
    """Refuse a checkpoint of a known system that cannot be converted, by its tables and the names in them."""
    names = {bare_name(name) for table in _tables(tree) for name in table}
    if "latents.mean" in tree and any(name.startswith("net.") for name in names):
        raise AlphaflowError(
            f"{path.name}: a checkpoint of alphaflow already: sample it as it is, or write the published form: --to "
            "alphaflow"
        )
    if "finished_steps" in tree and not _any_starts(names, ("network.s_embedder.", "s_embedder.")):
        raise AlphaflowError(
            f"{path.name}: a SoFlow checkpoint without s_embedder: its U-Net of CIFAR-10. The networks here are DiTs."
        )
    if "dmf_depth" in arguments or str(arguments.get("model")).startswith("DMF"):
        raise AlphaflowError(
            f"{path.name}: a Decoupled MeanFlow (DMF): one embedder serves both times, the last blocks take the "
            "second. No network here is built so."
        )
    if _any_starts(names, ("input_blocks.", "middle_block.", "enc.", "dec.", "map_layer0.", "map_noise."), inside=True):
        raise AlphaflowError(
            f"{path.name}: a U-Net, as py-meanflow, EDM and FastGen train on CIFAR-10. The networks here are DiTs."
        )
    if _any_starts(names, ("encoder.down.", "decoder.up.", "encoder.down_blocks.", "decoder.up_blocks."), inside=True):
        raise AlphaflowError(
            f"{path.name}: an autoencoder (KL-16, VA-VAE, an AutoencoderKL), no generator. It decodes another model's "
            "latents: --autoencoder takes a diffusers folder or file of it."
        )
    if "iteration" in tree and "grad_scaler" in tree and "model" not in tree:
        raise AlphaflowError(
            f"{path.name}: of a FastGen FSDP run, without weights: they lie beside it in {path.stem}.net_model. Make "
            "one file of that folder first: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER "
            "FILE.pt"
        )


def _any_starts(names: Iterable[str], beginnings: tuple[str, ...], *, inside: bool = False) -> bool:
    """Whether a name begins so; `inside`: or has it after a prefix, such as model. or first_stage_model."""
    inner = tuple(f".{each}" for each in beginnings) if inside else ()
    return any(
        name.startswith(beginnings) or (not name.startswith("autoencoder.") and any(each in name for each in inner))
        for name in names
    )


def _tables(tree: dict[str, Any]) -> list[dict[Any, Any]]:
    """List the tree itself and the tables where systems keep their weights, at most two levels deep."""
    first = [tree.get(key) for key in ("ema", "net", "model", "state_dict", "ema_model", "network")]
    tables = [table for table in first if isinstance(table, dict)]
    inner = [table.get(key) for table in tables for key in ("net", "ema", "network")]
    return [tree, *tables, *(table for table in inner if isinstance(table, dict))]


def refuse_unknown(names: Iterable[str], path: Path) -> NoReturn:
    """Refuse a table that is none of the known ones, or one of two that look alike."""
    known = list(names)
    if "t_embedder.mlp.0.weight" in known:
        raise AlphaflowError(
            f"{path.name}: SiT, DiT and REPA have the same tables of weights, and the file does not say which it is: "
            "they mean opposite things by t. Say it: --from sit, or --from dit, or --from repa"
        )
    some = (known or ["nothing"])[0][:80]
    raise AlphaflowError(f"{path.name}: a checkpoint of another family (it holds {some!r}, …). {KNOWN}")
