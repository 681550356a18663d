"""Pictures as people have them. Each writer makes one file; GOOD ones must decode, BAD ones be named."""

import os
import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

RED = (200, 30, 40)


def gradient(mode="RGB", size=(40, 30)):
    x = np.linspace(0, 255, size[0])[None, :, None] * np.ones((size[1], 1, 3))
    x[..., 1] = 255 - x[..., 1]
    return Image.fromarray(x.astype(np.uint8)).convert(mode)


def encoded(image, kind, **options):
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rotated_by_exif():
    """Red on the left as stored, EXIF says: turn by 90° clockwise; upright, red is on top."""
    image = Image.new("RGB", (40, 40), "white")
    image.paste(RED, (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif, quality=95)


def animated(kind):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, "blue", "green")]
    return encoded(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=100,
        **({"lossless": True} if kind == "WEBP" else {}),
    )


def png_that_claims(width, height):
    """A tiny file whose header promises a huge picture."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def transparent_palette():
    image = gradient("P")
    image.info["transparency"] = 0
    return encoded(image, "PNG", transparency=0)


def grey16():
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    return encoded(Image.fromarray(values), "PNG")


def float_tiff():
    return encoded(Image.fromarray(np.linspace(0, 1, 24 * 24, dtype=np.float32).reshape(24, 24)), "TIFF")


JPEG = encoded(gradient(), "JPEG")
GOOD = {
    "grey.jpg": encoded(gradient("L"), "JPEG"),
    "grey-alpha.png": encoded(gradient("LA"), "PNG"),
    "rgba.png": encoded(Image.new("RGBA", (20, 20), (*RED, 0)), "PNG"),
    "palette.png": encoded(gradient("P"), "PNG"),
    "palette-transparent.png": transparent_palette(),
    "bilevel.png": encoded(gradient("1"), "PNG"),
    "cmyk.jpg": encoded(gradient("CMYK"), "JPEG"),
    "sixteen-bit.png": grey16(),
    "float.tiff": float_tiff(),
    "exif-rotated.jpg": rotated_by_exif(),
    "broken-exif.jpg": encoded(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"),
    "animated.gif": animated("GIF"),
    "animated.webp": animated("WEBP"),
    "animated.apng": animated("PNG"),
    "one-pixel.png": encoded(Image.new("RGB", (1, 1), RED), "PNG"),
    "thin.png": encoded(gradient(size=(3, 500)), "PNG"),
    "png-called.jpg": encoded(gradient(), "PNG"),
    "jpeg-called.PNG": JPEG,
    "UPPER.JPEG": JPEG,
    "mixed.JpG": JPEG,
    "bitmap.bmp": encoded(gradient(), "BMP"),
    "portable.ppm": encoded(gradient(), "PPM"),
    "progressive.jpg": encoded(gradient(), "JPEG", progressive=True),
    "two\nlines.jpg": JPEG,
    "ünïcödé 图片 🙂.jpg": JPEG,
    "-dash and 'quotes\".jpg": JPEG,
    "trailing-junk.jpg": JPEG + b"junk" * 100,
}
BAD = {
    "empty.jpg": (b"", "an empty file"),
    "text.jpg": (b"this is no picture", "not a whole picture"),
    "truncated.jpg": (encoded(gradient(size=(200, 200)), "JPEG")[:1500], "not a whole picture"),
    "truncated.png": (encoded(gradient(size=(200, 200)), "PNG")[:-300], "not a whole picture"),
    "bomb.png": (png_that_claims(60000, 60000), "60000 x 60000 pixels, the limit is 200 million"),
    "half-header.gif": (b"GIF89a\x01", "not a whole picture"),
}
ASIDE = {"notes.txt": b"hello", ".hidden.jpg": JPEG, "Thumbs.db": b"\0", "noextension": JPEG}


def write_awkward(folder):
    """All of them in folder/things, with links in circles and to nowhere; returns the names of the bad ones."""
    things = folder / "things"
    things.mkdir(parents=True)
    for name, data in {**GOOD, **{name: data for name, (data, _) in BAD.items()}, **ASIDE}.items():
        (things / name).write_bytes(data)
    (things / b"latin-\xe9.jpg".decode("utf-8", "surrogateescape")).write_bytes(JPEG)
    (things / "round").symlink_to(folder, target_is_directory=True)
    (things / "self.jpg").symlink_to("self.jpg")
    (things / "nowhere.jpg").symlink_to("gone.jpg")
    (things / "linked.jpg").symlink_to("mixed.JpG")
    os.mkfifo(things / "pipe.jpg")
    (things / "folder.jpg").mkdir()
    return {*BAD, "self.jpg", "nowhere.jpg", "pipe.jpg"}
