"""One encoded image: is it whole, how large is it, and its bytes in a form that no decoder stumbles over.

DALI is fast, but a file that it cannot parse may end the process. So it is given two kinds of bytes only: ordinary
JPEGs, which `jpeg_size` knows by walking their segments in microseconds, and binary PPMs, into which Pillow turns
everything else that it can decode. The torch loader takes the same bytes, so the two agree on what is bad and why.
"""

import io
import struct
import warnings
from collections.abc import Callable
from functools import lru_cache

from PIL import Image, UnidentifiedImageError

from reco_fast.pipelines.exif import exif_orientation, image_orientation, plain_exif
from reco_fast.pipelines.heif import HEIF_HINT, is_heif, reads_heif
from reco_fast.pipelines.pixels import UNSAID, Decoding, Notice, eight_bits, notice_of, over

MAX_PIXELS = 150_000_000
"""Larger frames are refused before any memory is taken for them; 12,000 × 9,000 passes, 450 MB is the most."""

# Pillow warns of more than 89 million pixels and of damaged tags; here an image is good, or bad with a reason.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(ValueError):
    """These bytes are not an image that can be used; the message says why."""


Note = Callable[[Notice], None]


def to_plain(data: bytes, decoding: Decoding = UNSAID, note: Note | None = None) -> tuple[bytes, int, int]:
    """Bytes that either decoder takes (an ordinary JPEG as it is, but for its EXIF; anything else as a PPM), height and
    width. `note` is told what there is to say of an image that can be used.

    Raises:
        BadImage: with the reason.
    """
    data = plain_exif(data)
    size = jpeg_size(data)
    return (data, *size) if size is not None else to_ppm(data, decoding, note)


def to_ppm(data: bytes, decoding: Decoding = UNSAID, note: Note | None = None) -> tuple[bytes, int, int]:
    """Decode with Pillow and pack as binary PPM: bytes, height and width. Raises BadImage."""
    image = decode_image(data, decoding, note)
    return ppm_header(image.height, image.width) + image.tobytes(), image.height, image.width


def ppm_header(height: int, width: int) -> bytes:
    """What stands before the 3 · height · width bytes of a binary PPM."""
    return b"P6\n%d %d\n255\n" % (width, height)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, decoding: Decoding = UNSAID, note: Note | None = None) -> Image.Image:
    """An upright 8-bit RGB Pillow image; what is transparent and what has more than 8 bits as `decoding` says.

    Raises:
        BadImage: with the reason.
    """
    try:
        return _decode(plain_exif(data), decoding, note)
    except BadImage:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on hostile bytes
        raise BadImage(_reason(error)) from None


def _decode(data: bytes, decoding: Decoding, note: Note | None) -> Image.Image:
    image = _open(data)
    shallow, scaled = eight_bits(image, io.BytesIO(data), decoding.range)
    shallow.load()
    if scaled is not None and note is not None and (notice := notice_of(image.mode, scaled, decoding)) is not None:
        note(notice)
    turn = _TURNS.get(image_orientation(image))
    upright = over(shallow, decoding.background)
    return upright if turn is None else upright.transpose(turn)


def _open(data: bytes) -> Image.Image:
    """Parse the header alone."""
    if not data:
        raise BadImage("the file is empty")
    try:
        image = _identified(data)
    except UnidentifiedImageError:
        if is_heif(data[:32]) and not reads_heif():
            raise BadImage(f"HEIC, which is not read here; {HEIF_HINT}") from None
        raise BadImage(f"not an image: it starts with {bytes(data[:12])!r}") from None
    except Image.DecompressionBombError:
        raise BadImage(f"its header claims more than the {MAX_PIXELS:,} pixels allowed") from None
    _check_size(image.height, image.width)
    return image


def _identified(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if is_heif(data[:32]) and reads_heif():  # the first of its kind in this process: now Pillow knows it
            return Image.open(io.BytesIO(data))
        raise


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise BadImage(f"its header claims {width} × {height} pixels")
    if height * width > MAX_PIXELS:
        raise BadImage(f"its header claims {width} × {height} pixels, more than the {MAX_PIXELS:,} allowed")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_FRAMES = {0xC0: True, 0xC1: True, 0xC2: False}  # start-of-frame markers taken as ordinary → is it baseline
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN, _SCAN, _QUANTIZATION, _EXIF, _ADOBE = 0xC4, 0xDA, 0xDB, 0xE1, 0xEE
_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">BHHB")
_PIXELS_PER_BYTE = 512  # baseline codes a block of 64 pixels in 2 bits at the least: 256 a byte, and twice that here


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width in pixels, upright (after the EXIF orientation), of an ordinary JPEG: an undamaged-looking 8-bit
    grey or colour one, baseline or progressive. None for anything else, damaged or not.

    Raises:
        BadImage: ordinary, but its size cannot be true or is not allowed.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    height = width = 0
    baseline = sideways = False
    components: dict[int, int] = {}  # identifier → quantization table
    tables: set[int] = set()
    position = 2
    end = len(data) - 4
    while position < end:
        start, marker, length = _SEGMENT.unpack_from(data, position)
        body = data[position + 4 : position + 2 + length]
        if start != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or len(body) != length - 2:
            return None
        if marker in _FRAMES:
            if height or len(body) < 6:
                return None
            precision, height, width, count = _FRAME.unpack_from(body)
            components = dict(zip(body[6::3], body[8::3], strict=False))
            samplings = body[7::3]
            if precision != 8 or count not in (1, 3) or len(body) != 6 + 3 * count or len(components) != count:
                return None
            if not all(1 <= s >> 4 <= 4 and 1 <= s & 15 <= 4 for s in samplings) or bytes(components) == b"RGB":
                return None
            baseline = _FRAMES[marker]
        elif marker == _HUFFMAN:
            if not _huffman_tables_hold(body):
                return None
        elif marker == _QUANTIZATION:
            tables.update(_quantization_tables(body))
        elif marker == _EXIF:
            sideways |= body.startswith(b"Exif\0\0") and (exif_orientation(body[6:]) or 1) >= 5
        elif marker == _ADOBE:
            if body.startswith(b"Adobe") and body[11:12] == b"\0":
                return None  # not YCbCr
        elif marker == _SCAN:
            if not body or len(body) != 4 + 2 * body[0] or not components.keys() >= set(body[1:-3:2]):
                return None
            break
        elif marker in _OTHER_FRAMES:
            return None
        position += 2 + length
    if not (height and width) or position >= end or not tables.issuperset(components.values()):
        return None
    if data.rfind(b"\xff\xd9", position) < 0:  # it cannot stand inside a scan, where each 0xff is followed by 0x00
        return None
    _check_size(height, width)
    if baseline and height * width > _PIXELS_PER_BYTE * len(data):
        raise BadImage(f"its header claims {width} × {height} pixels, which {len(data):,} bytes cannot hold")
    return (width, height) if sideways else (height, width)


@lru_cache(maxsize=4096)  # encoders write the same few tables into all their files
def _huffman_tables_hold(body: bytes) -> bool:
    """Whether each table's code lengths are possible and its values are all there."""
    while body:
        counts = body[1:17]
        used = sum(count / (1 << length) for length, count in enumerate(counts, 1))  # of all codes there are
        size = 17 + sum(counts)
        if body[0] & 0xEC or used > 1 or size > min(len(body), 17 + 256):
            return False
        body = body[size:]
    return True


def _quantization_tables(body: bytes) -> list[int]:
    found = []
    position = 0
    while position < len(body):
        size = 129 if body[position] >> 4 else 65
        if position + size <= len(body):
            found.append(body[position] & 15)
        position += size
    return found
