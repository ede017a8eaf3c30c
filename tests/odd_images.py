"""Encoded images that trainers meet in the wild: odd ones that must train, and bad ones that must not."""

import io
import struct

import numpy as np
from PIL import Image

__all__ = ["bad_images", "deceiving_images", "encode", "odd_images", "picture"]


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth colour picture, so that JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def odd_images() -> dict[str, bytes]:
    """File name → bytes; each can be decoded."""
    image = picture()
    depth16 = Image.fromarray(np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = image.copy()
    alpha.putalpha(128)
    jpeg = encode(image, "JPEG")
    return {
        "plain.jpg": jpeg,
        "PROGRESSIVE.JPEG": encode(image, "JPEG", progressive=True),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "rgb.jpg": encode(image, "JPEG", keep_rgb=True),
        "rotated.jpg": encode(image, "JPEG", exif=exif),
        "padded.jpg": jpeg + b"\0" * 100,
        "1x1.jpg": encode(picture(1, 1), "JPEG"),
        "thin.jpg": encode(picture(700, 2), "JPEG"),
        "png named.jpg": encode(image, "PNG"),
        "name with spaces, ünïcode 猫.png": encode(image, "PNG"),
        "16 bits.png": encode(depth16, "PNG"),
        "alpha.png": encode(alpha, "PNG"),
        "palette.png": encode(image.convert("P"), "PNG"),
        "transparent palette.png": encode(image.convert("P"), "PNG", transparency=b"\x00\x80"),
        "bilevel.png": encode(image.convert("1"), "PNG"),
        "lossy.webp": encode(image, "WEBP"),
        "image.bmp": encode(image, "BMP"),
        "image.TIFF": encode(image, "TIFF"),
        "image.gif": encode(image, "GIF"),
    }


def bad_images() -> dict[str, bytes]:
    """File name → bytes; none can be decoded, several kill a decoder that is given them unchecked."""
    jpeg, png = encode(picture(400, 300), "JPEG"), encode(picture(), "PNG")
    size = jpeg.index(b"\xff\xc0") + 5
    lying = jpeg[:size] + struct.pack(">HH", 30_000, 30_000) + jpeg[size + 4 :]
    claiming = jpeg[:size] + struct.pack(">HH", 9_000, 12_000) + jpeg[size + 4 :]
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "cut header.jpg": jpeg[:30],
        "two bytes.jpg": jpeg[:2],
        "empty.jpg": b"",
        "text.jpg": b"this is not an image\n" * 50,
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "zeros.jpg": bytes(5000),
        "lying 30000.jpg": lying,
        "lying 12000.jpg": claiming,
        "truncated.png": png[: len(png) // 2],
        "damaged.png": png[:60] + bytes(40) + png[100:],
        "jpeg start only.jpg": b"\xff\xd8\xff" + b"garbage" * 100,
        "no frame.jpg": b"\xff\xd8\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + b"\x11" * 64 + b"\xff\xd9",
    }


def deceiving_images() -> dict[str, bytes]:
    """JPEGs with every marker in its place and the right end, whose tables no decoder can use."""
    jpeg = encode(picture(400, 300), "JPEG")
    huffman, frame, scan = (jpeg.index(marker) for marker in (b"\xff\xc4", b"\xff\xc0", b"\xff\xda"))
    return {
        "huffman.jpg": jpeg[: huffman + 5] + b"\xff" * 16 + jpeg[huffman + 21 :],
        "quantization.jpg": jpeg[: frame + 12] + b"\x03" + jpeg[frame + 13 :],
        "sampling.jpg": jpeg[: frame + 11] + b"\xff" + jpeg[frame + 12 :],
        "component.jpg": jpeg[: scan + 5] + b"\x77" + jpeg[scan + 6 :],
    }
