"""Encoded images that trainers meet in the wild: odd ones that must train, and bad ones that must not."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

__all__ = [
    *("bad_images", "deceiving_images", "encode", "exif_of", "odd_exif", "odd_images", "picture", "png", "tiff"),
    "with_exif",
]


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


def png(values: np.ndarray, depth: int, colour: int, key: tuple[int, ...] = ()) -> bytes:
    """Of `values` [H, W, channels], in PNG's colour type; with a key, the values of one channel each that are
    transparent. Pillow writes neither 16 bits in colour nor keys of them."""
    height, width = values.shape[:2]
    samples = values.reshape(height, -1)
    if depth < 8:
        packed = np.unpackbits(samples.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :].reshape(height, -1)
        rows = [np.packbits(row).tobytes() for row in packed]
    else:
        rows = [row.astype(f">u{depth // 8}").tobytes() for row in samples]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    if key:
        chunks.insert(1, (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values: np.ndarray, **tags: tuple[int, int]) -> bytes:
    """Of grey or RGB `values` in their own type and byte order, uncompressed; `tags`: t258=(type, value) and so on."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    data = values.tobytes()
    entries = {256: (4, width), 257: (4, height), 258: (3, 8 * values.itemsize), 259: (3, 1), 277: (3, channels)}
    entries |= {262: (3, 1 if channels == 1 else 2), 273: (4, 0), 278: (4, height), 279: (4, len(data))}
    entries |= {339: (3, {"u": 1, "i": 2, "f": 3}[values.dtype.kind])} | {int(k[1:]): v for k, v in tags.items()}
    entries[273] = (4, 8 + 2 + 12 * len(entries) + 4)
    directory = exif_of(*((tag, kind, 1, value) for tag, (kind, value) in sorted(entries.items())), order=order)
    return directory + data


def exif_of(*entries: tuple[int, int, int, int], order: str = ">") -> bytes:
    """A TIFF header and a directory of entries: tag, type, count, and the value or where it stands."""
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8)
    body = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(f"{order}HHI", tag, kind, count)
        inline = {1: "Bxxx", 3: "Hxx", 7: "Bxxx", 8: "Hxx", 9: "i"}.get(kind, "I") if count < 3 else "I"
        body += struct.pack(order + inline, value)
    return head + body + struct.pack(f"{order}I", 0)


def with_exif(jpeg: bytes, *segments: bytes) -> bytes:
    """`jpeg` with these bodies of APP1 segments before its others."""
    return jpeg[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body for body in segments) + jpeg[2:]


def odd_exif() -> dict[str, tuple[bytes, int]]:
    """Name → EXIF data, and the orientation that a lenient reader finds in them."""
    six = (0x0112, 3, 1, 6)
    good = exif_of(six)
    return {
        "short": (good, 6),
        "short, little-endian": (exif_of(six, order="<"), 6),
        "long": (exif_of((0x0112, 4, 1, 6)), 6),
        "byte": (exif_of((0x0112, 1, 1, 6)), 6),
        "undefined": (exif_of((0x0112, 7, 1, 6)), 6),
        "signed": (exif_of((0x0112, 8, 1, 6)), 6),
        "ascii": (exif_of((0x0112, 2, 2, 0x36000000)), 1),
        "a type that is none": (exif_of((0x0112, 99, 1, 6)), 1),
        "none": (exif_of((0x0112, 3, 0, 6)), 6),
        "three": (exif_of((0x0112, 3, 3, 26)) + b"\0\6\0\6\0\6", 6),
        "0": (exif_of((0x0112, 3, 1, 0)), 1),
        "9": (exif_of((0x0112, 3, 1, 9)), 1),
        "elsewhere": (exif_of((0x0112, 3, 3, 99_999)), 1),
        "no directory": (b"MM\0*\xff\xff\xff\xff", 1),
        "cut off": (good[:15], 1),
        "more entries than there are": (good[:8] + b"\1\0" + good[10:], 6),
        "a loop": (good[:-4] + b"\0\0\0\x08", 6),
        "empty": (b"", 1),
        "text": (b"no header at all", 1),
        "no byte order": (b"XX" + good[2:], 1),
        "twice": (exif_of(six, (0x0112, 3, 1, 3)), 6),
        "resolution as text": (exif_of(six, (0x011A, 2, 4, 0x37320000), (0x0128, 3, 1, 2)), 6),
        "resolution as a short": (exif_of(six, (0x011A, 3, 1, 72), (0x0128, 3, 1, 2)), 6),
        "text out of reach": (exif_of((0x010F, 2, 500, 40_000), six), 6),
        "EXIF out of reach": (exif_of(six, (0x8769, 4, 1, 90_000)), 6),
        "GPS as a negative number": (exif_of(six, (0x8825, 9, 1, -5)), 6),
    }
