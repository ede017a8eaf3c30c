"""EXIF: the orientation of a picture, read by one lenient function, and files whose EXIF every decoder reads alike.

What cameras and tools write has wrong types and lengths. Pillow raises at some of it, DALI at other, and where neither
does, they may turn the same picture in two ways. So neither is given EXIF that `plain_exif` has not gone over.
"""

import contextlib
import re
import struct
from collections.abc import Iterator

from PIL import Image

_ORIENTATION, _XMP_TAG, _POINTERS = 0x0112, 0x02BC, (0x8769, 0x8825, 0xA005)  # to EXIF, GPS, interoperability
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "B", 7: "B", 8: "H", 9: "I"}  # TIFF's types, as unsigned ones
_EXIF, _XMP, _FURTHER_PICTURES = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0"
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_SEGMENT = struct.Struct(">BBH")


def exif_orientation(exif: bytes) -> int | None:
    """1 to 8, as EXIF counts, from EXIF data, which begin with a TIFF header; None where they say none of these,
    whatever else is wrong with them."""
    with contextlib.suppress(struct.error):  # cut off, or pointing outside of themselves
        for place, order, tag, kind, count in _entries(exif):
            if tag == _ORIENTATION and kind in _WHOLE_NUMBERS:
                number = struct.Struct(order + _WHOLE_NUMBERS[kind])
                if count * number.size > 4:
                    (place,) = struct.unpack_from(f"{order}I", exif, place)
                (value,) = number.unpack_from(exif, place)
                if 1 <= value <= 8:
                    return int(value)
    return None


def _entries(exif: bytes) -> Iterator[tuple[int, str, int, int, int]]:
    """Of each entry of the first directory: where its value stands, the byte order, its tag, type and count. Raises
    struct.error at the end of what is there."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is not None:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            yield place + 8, order, *struct.unpack_from(f"{order}HHI", exif, place)


def _xmp_orientation(xmp: bytes) -> int | None:
    found = _IN_XMP.search(xmp)
    return None if found is None else int(found[1])


def image_orientation(image: Image.Image) -> int:
    """1 to 8: of a Pillow image that is loaded. Pillow has turned a TIFF by then."""
    if image.format == "TIFF":
        return 1
    exif = image.info.get("exif", b"")
    if not exif:  # as ImageMagick writes it into a PNG: a title, a length, and lines of hexadecimal digits
        with contextlib.suppress(ValueError):
            exif = bytes.fromhex("".join(image.info.get("Raw profile type exif", "").split("\n")[3:]))
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    return exif_orientation(exif.removeprefix(_EXIF).removeprefix(_EXIF)) or _xmp_orientation(xmp) or 1


def plain_exif(data: bytes) -> bytes:
    """An encoded image with nothing in its EXIF that decoders could read in different ways; one without EXIF as it is.

    A JPEG has no more than the orientation then, also of one that only its XMP says, and is no longer followed by the
    further pictures of an MPO. A TIFF loses tags of impossible types.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _plain_jpeg(data)
    return _plain_tiff(data) if data[:4] in (b"II*\0", b"MM\0*") else data


def _plain_jpeg(data: bytes) -> bytes:
    cuts: list[tuple[int, int]] = []
    by_exif = by_xmp = None
    has_exif, position = False, 2
    while position + 4 <= len(data):
        start, marker, length = _SEGMENT.unpack_from(data, position)
        if start != 0xFF or marker < 0xC0 or marker == 0xDA:  # the scan, or damage
            break
        body, end = position + 4, position + 2 + length
        if marker == 0xFF:  # a filler
            end = position + 1
        elif marker == 0xE1 and data.startswith(_EXIF, body):
            has_exif = True
            by_exif = by_exif or exif_orientation(data[body + len(_EXIF) : end])
            cuts.append((position, end))
        elif marker == 0xE1 and data.startswith(_XMP, body):
            by_xmp = by_xmp or _xmp_orientation(data[body:end])
        elif marker == 0xE2 and data.startswith(_FURTHER_PICTURES, body):
            cuts.append((position, end))
        position = end
    if not cuts and by_xmp is None:
        return data
    plain = _exif_segment(by_exif or by_xmp or 1) if has_exif or by_xmp is not None else b""
    if len(cuts) == 1 and data[slice(*cuts[0])] == plain:
        return data
    kept = [2, *(place for cut in cuts for place in cut), len(data)]
    whole = memoryview(data)  # a camera's file of megabytes is copied once
    rest = (whole[begin:end] for begin, end in zip(kept[::2], kept[1::2], strict=True))
    return b"".join((whole[:2], plain, *rest))


def _exif_segment(orientation: int) -> bytes:
    """The smallest that says it."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, _ORIENTATION, 3, 1, orientation, 0, 0)
    return _SEGMENT.pack(0xFF, 0xE1, 2 + len(_EXIF) + len(tiff)) + _EXIF + tiff


def _plain_tiff(data: bytes) -> bytes:
    changed = bytearray()

    def put(place: int, layout: str, *values: int) -> None:
        changed.extend(b"" if changed else data)
        struct.pack_into(layout, changed, place, *values)

    with contextlib.suppress(struct.error):
        for place, order, tag, kind, count in _entries(data):
            if tag == _ORIENTATION and (kind, count) != (3, 1):
                put(place - 6, f"{order}HIHH", 3, 1, exif_orientation(data) or 1, 0)
            elif (tag in _POINTERS and (kind not in (4, 13) or count != 1)) or (tag == _XMP_TAG and kind not in (1, 7)):
                put(place - 6, f"{order}HI", 7, 0)
    return bytes(changed) or data
