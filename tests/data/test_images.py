"""Pictures as they are: every mode, every spelling, every kind of broken file; folders, zips and tars of them."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from awkward_pictures import ASIDE, BAD, GOOD, RED, encoded, gradient, png_that_claims, write_awkward
from PIL import Image

from alphaflow_cli.data.classes import choose_split, folders_of, read_classes
from alphaflow_cli.data.pictures import MAX_PIXELS, BadPicture, decode, square
from alphaflow_cli.data.sources import open_folder, open_source
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.files import read_file

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def pixels(data, size=16):
    return decode(data, size, MAX_PIXELS)


def test_there_are_at_least_25_awkward_pictures():
    assert len(GOOD) >= 25


@pytest.mark.parametrize("name", GOOD)
def test_an_awkward_picture_becomes_a_square_rgb_array(name):
    found = pixels(GOOD[name])
    assert found.shape == (3, 16, 16)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("name", BAD)
def test_a_broken_picture_is_named_with_the_reason(name):
    data, why = BAD[name]
    with pytest.raises(BadPicture, match=why) as refused:
        pixels(data)
    assert "0x" not in str(refused.value)  # an address in memory


def test_adms_crop_halves_by_box_then_resizes_by_bicubic_then_cuts():
    values = np.random.default_rng(0).integers(0, 256, (104, 208, 3), dtype=np.uint8)
    across = (values[:, ::2].astype(np.int64) + values[:, 1::2] + 1) // 2  # BOX: the mean of two, then of two of these
    once = Image.fromarray(((across[::2] + across[1::2] + 1) // 2).astype(np.uint8))
    small = np.asarray(once.resize((64, 32), Image.Resampling.BICUBIC))
    found = decode(encoded(Image.fromarray(values), "PNG"), 32, MAX_PIXELS, "adm")
    np.testing.assert_array_equal(found, small[:, 16:48].transpose(2, 0, 1))
    as_it_is = encoded(Image.fromarray(values[:32, :32]), "PNG")
    np.testing.assert_array_equal(decode(as_it_is, 32, MAX_PIXELS, "adm"), values[:32, :32].transpose(2, 0, 1))


def test_a_thread_of_pixels_is_not_enlarged_to_a_picture_that_no_memory_holds():
    thread = encoded(Image.new("L", (1, 20_000)), "PNG")
    with pytest.raises(BadPicture, match="1 x 20000 pixels, which ADM's crop would enlarge to 328 million"):
        decode(thread, 128, MAX_PIXELS, "adm")
    assert decode(thread, 128, MAX_PIXELS).shape == (3, 128, 128)
    assert decode(encoded(Image.new("L", (1, 1000)), "PNG"), 16, 1000, "adm").shape == (3, 16, 16)


def test_grey_modes_agree_with_each_other():
    grey = pixels(encoded(gradient("L"), "PNG"))
    assert (grey[0] == grey[1]).all()
    np.testing.assert_array_equal(pixels(encoded(gradient("LA"), "PNG")), grey)


def test_transparent_parts_are_white():
    assert (pixels(GOOD["rgba.png"]) == 255).all()


def test_sixteen_bits_are_scaled_not_cut():
    values = np.array([[0, 200, 32896, 65400]], np.uint16).repeat(4, 0)
    found = pixels(encoded(Image.fromarray(values), "PNG"), size=4)
    np.testing.assert_array_equal(found[0, 0], [0, 1, 128, 254])


def test_exif_turns_the_picture_upright():
    found = pixels(GOOD["exif-rotated.jpg"]).astype(int)
    assert np.abs(found[:, 3, 8] - RED).max() < 12
    assert found[:, 12, 8].min() > 240


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.apng"])
def test_an_animation_is_its_first_frame(name):
    assert np.abs(pixels(GOOD[name])[:, 8, 8].astype(int) - RED).max() <= 3


def test_cmyk_is_not_inverted():
    found = pixels(encoded(Image.new("RGB", (20, 20), RED).convert("CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(found[:, 8, 8] - RED).max() < 12


def test_the_crop_is_the_centred_square():
    image = Image.new("RGB", (30, 10), "black")
    image.paste(RED, (10, 0, 20, 10))
    assert (np.asarray(square(image, 10)) == RED).all()
    assert (np.asarray(square(image.transpose(Image.Transpose.ROTATE_90), 10)) == RED).all()


def test_the_resize_is_pillows_lanczos():
    image = gradient(size=(40, 40))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(encoded(image, "PNG")), expected)


def test_a_picture_of_the_right_size_is_not_touched():
    image = gradient(size=(16, 16))
    np.testing.assert_array_equal(pixels(encoded(image, "PNG")), np.asarray(image).transpose(2, 0, 1))


def test_a_hundred_megapixels_are_decoded():
    data = encoded(Image.new("RGB", (10_000, 10_000), RED), "PNG", compress_level=1)
    assert (pixels(data)[:, 5, 5] == RED).all()


def test_the_limit_is_checked_before_anything_is_decoded():
    with pytest.raises(BadPicture, match=r"limit is 0\.5 million"):
        decode(png_that_claims(1000, 501), 16, 500_000)


def test_floats_outside_zero_and_one_are_refused():
    image = Image.fromarray(np.full((4, 4), 17.0, np.float32))
    with pytest.raises(BadPicture, match="outside"):
        pixels(encoded(image, "TIFF"))


def test_a_folder_lists_pictures_and_leaves_the_rest_aside(tmp_path):
    write_awkward(tmp_path / "root")
    source = open_folder(tmp_path / "root")
    names = {name.removeprefix("things/") for name in source.names}
    assert names >= set(GOOD) | set(BAD) | {"linked.jpg", "self.jpg", "nowhere.jpg", "pipe.jpg"}
    assert not names & set(ASIDE)
    assert not any(name.startswith("round") for name in names)
    assert source.notes == [
        "4 other files left aside (.db, .txt)",
        "1 links that lead back to their own folder not followed",
    ]


def test_a_pipe_does_not_block_and_a_folder_linked_twice_counts_twice(tmp_path):
    write_awkward(tmp_path / "root")
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "root/things/pipe.jpg")
    (tmp_path / "root/again").symlink_to("things/folder.jpg", target_is_directory=True)
    (tmp_path / "root/things/folder.jpg/a.png").write_bytes(GOOD["rgba.png"])
    names = open_folder(tmp_path / "root").names
    assert {"again/a.png", "things/folder.jpg/a.png"} <= set(names)


TREE = {"train/cat/1.jpg": b"a", "train/cat/deep/2.jpg": b"bb", "train/dog/3.jpg": b"ccc", "train/notes.txt": b"no"}


def write_archive(path, tree):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in tree.items():
                archive.writestr(name, data)
        return path
    mode = {".gz": "w:gz", ".xz": "w:xz", ".tar": "w"}[path.suffix]
    with tarfile.open(path, mode) as archive:
        for name, data in tree.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_folder(path, tree):
    for name, data in tree.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("form", ["folder", "a.zip", "a.tar", "a.tar.gz", "a.tar.xz"])
def test_every_form_lists_and_reads_the_same_pictures(tmp_path, form):
    make = write_folder if form == "folder" else write_archive
    source = open_source(str(make(tmp_path / form, TREE)))
    assert list(source.names) == ["train/cat/1.jpg", "train/cat/deep/2.jpg", "train/dog/3.jpg"]
    with source.reading([0, 2]) as fetches:
        kept = list(fetches)  # all of them, before the first is called: they work until the context ends
        assert [(line, fetch()) for line, fetch in kept] == [(0, b"a"), (2, b"ccc")]
    assert source.notes == ["1 other file left aside (.txt)"]


@pytest.mark.parametrize("form", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_truncated_archive_is_named(tmp_path, form):
    tree = {f"c/{index}.jpg": np.random.default_rng(index).bytes(3000) for index in range(20)}
    path = write_archive(tmp_path / form, tree)
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(AlphaflowError, match=form):
        open_source(str(path))


def test_what_is_not_there_lists_what_could_be():
    with pytest.raises(AlphaflowError, match="shapes:4000"):
        open_source("nowhere/at/all")


def classes_of(names, given=None):
    lines, prefix = choose_split(names)
    folders = folders_of([names[line] for line in lines], prefix)
    classes = read_classes(folders, given, None)
    return classes, [classes.folders.index(folder) for folder in folders]


@pytest.mark.parametrize(
    ("names", "folders", "labels"),
    [
        (["b/1.jpg", "a/2.jpg", "a/x/3.jpg"], ["a", "a/x", "b"], [2, 0, 1]),
        (["1.jpg", "2.jpg"], [""], [0, 0]),
        (["data/set/b/1.jpg", "data/set/a/2.jpg"], ["a", "b"], [1, 0]),
        (["in/train/n02/1.JPEG", "in/train/n01/2.JPEG", "in/val/n01/3.JPEG"], ["n01", "n02"], [1, 0]),
        (["train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg"], ["a", "b"], [0, 1]),
        (["train/a/1.jpg", "val/a/2.jpg"], ["a"], [0]),
        (["train/1.jpg", "plane/2.jpg"], ["plane", "train"], [1, 0]),
        (["only/1.jpg", "only/2.jpg"], [""], [0, 0]),
    ],
)
def test_the_class_is_the_folder_below_what_all_share(names, folders, labels):
    classes, found = classes_of(names)
    assert classes.folders == folders
    assert found == labels


def test_of_several_folders_of_a_training_split_the_same_is_taken_each_time():
    spelled = ["train", "Train", "TRAIN", "tRAIN", "trAIN", "training", "Training", "TRAINING", "trainING"]
    names = [f"{split}/{i}.png" for split in (*spelled, "val") for i in range(2)]
    assert choose_split(names) == ([0, 1], "train/")
    assert choose_split(names[2:]) == ([2, 3], "TRAIN/")  # the first in sorted order


def test_imagenet_is_recognised_in_its_order():
    classes, labels = classes_of(
        ["ILSVRC/Data/CLS-LOC/train/n01443537/a.JPEG", "ILSVRC/Data/CLS-LOC/train/n01440764/b.JPEG"]
    )
    assert classes.imagenet
    assert (classes.folders, labels) == (["n01440764", "n01443537"], [1, 0])
    assert not classes_of(["cat/a.jpg", "dog/b.jpg"])[0].imagenet


def test_pictures_beside_class_folders_are_refused():
    with pytest.raises(AlphaflowError, match="1 pictures lie beside the class folders"):
        classes_of(["a/1.jpg", "b/1.jpg", "stray.jpg"])


@pytest.mark.parametrize(
    "given",
    [
        ["dog", "cat", "bird"],
        {"dog": 0, "cat": 1, "bird": 2},
        {"dog": {"index": 0}, "cat": {"index": 1, "name": "Cat"}, "bird": {"index": 2}},
    ],
)
def test_classes_json_decides_indices_and_keeps_empty_classes(given):
    classes, labels = classes_of(["cat/1.jpg", "dog/1.jpg"], json.dumps(given).encode())
    assert classes.folders == ["dog", "cat", "bird"]
    assert labels == [1, 0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cat": 0}, "no entry for the folder 'dog'"),
        ({"cat": 0, "dog": 2}, "without gaps"),
        (3, "should be"),
        ({"cat": {}}, "should be"),
    ],
)
def test_a_wrong_classes_json_is_named(given, words):
    with pytest.raises(AlphaflowError, match=words):
        classes_of(["cat/1.jpg", "dog/1.jpg"], json.dumps(given).encode())


@pytest.mark.parametrize("form", ["folder", "a.zip", "a.tar.gz"])
def test_classes_json_is_found_in_every_form(tmp_path, form):
    make = write_folder if form == "folder" else write_archive
    source = open_source(str(make(tmp_path / form, {"classes.json": b'["x"]', "x/1.jpg": b"a"})))
    assert source.classes_json() == b'["x"]'
    assert source.notes == []


@pytest.mark.parametrize("form", ["folder", "a.zip", "a.tar.gz"])
def test_a_classes_json_in_the_split_that_is_taken_decides(tmp_path, form):
    make = write_folder if form == "folder" else write_archive
    files = {f"{split}/{name}/1.jpg": b"a" for split in ("train", "test") for name in "xy"}
    source = open_source(str(make(tmp_path / form, {**files, "train/classes.json": b'["y", "x"]'})))
    assert source.classes_json() == b'["y", "x"]'


def test_the_classes_json_of_a_store_below_the_pictures_is_not_theirs(tmp_path):
    files = {"x/1.jpg": b"a", "y/1.jpg": b"a", "latents/classes.json": b'["y", "x"]'}
    assert open_source(str(write_folder(tmp_path / "set", files))).classes_json() is None


def test_a_picture_that_is_gone_is_its_own_fault_but_a_folder_that_is_gone_ends_the_run(tmp_path):
    source = open_source(str(write_folder(tmp_path / "set", {"a/1.jpg": b"a", "a/2.jpg": b"b"})))
    with source.reading([0, 1]) as fetches:
        (one, fetch_one), (_, fetch_two) = fetches
        (tmp_path / "set/a/1.jpg").unlink()
        with pytest.raises(FileNotFoundError):
            fetch_one()
        (tmp_path / "set").rename(tmp_path / "elsewhere")
        with pytest.raises(AlphaflowError, match="the folder is gone"):
            fetch_two()
    assert one == 0
