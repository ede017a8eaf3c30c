"""What Pillow decodes for both loaders: transparency, more than 8 bits, and EXIF of all kinds."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from loading import both_loaders, levels, training
from odd_images import deceiving_images, encode, exif_of, odd_exif, picture, png, tiff, with_exif
from PIL import Image

from reco_fast.pipelines.augmentations import Recipe, ViewRecipe
from reco_fast.pipelines.exif import plain_exif
from reco_fast.pipelines.images import decode_image, to_plain
from reco_fast.pipelines.pixels import Decoding, Notice, Notices
from reco_fast.pipelines.sources.open import open_source

RAMP = np.linspace(0, 4095, 64).astype(int).reshape(8, 8)  # 12 bits
BLACK_TO_WHITE = np.linspace(0, 255, 64).reshape(8, 8)
GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 4, 6  # PNG's types of colour
OPAQUE = np.full((8, 8), 65535)
WHOLE_RANGE = Decoding(range=(0, 4095))

PILLOW = int(PIL.__version__.partition(".")[0])


def colour(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def pgm(values: np.ndarray, most: int, kind: str = "P5") -> bytes:
    height, width = values.shape[:2]
    samples = values.astype(">u2").tobytes() if kind in ("P5", "P6") else " ".join(map(str, values.ravel())).encode()
    return f"{kind}\n{width} {height}\n{most}\n".encode() + samples


def decoded(data: bytes, decoding: Decoding = WHOLE_RANGE) -> tuple[np.ndarray, list[Notice]]:
    notices: list[Notice] = []
    return np.asarray(decode_image(data, decoding, notices.append)).astype(int), notices


DEEP = {
    "16-bit PNG": png(RAMP, 16, GREY),
    "16-bit PNG in colour": png(colour(RAMP), 16, COLOUR),
    "16-bit PNG with alpha": png(np.stack([RAMP, OPAQUE], axis=-1), 16, GREY_ALPHA),
    "16-bit PNG in colour with alpha": png(np.dstack([colour(RAMP), OPAQUE]), 16, COLOUR_ALPHA),
    "16-bit TIFF": tiff(RAMP.astype("<u2")),
    "16-bit TIFF, big-endian": tiff(RAMP.astype(">u2")),
    "signed 16-bit TIFF": tiff(RAMP.astype("<i2")),
    "int32 TIFF": tiff(RAMP.astype("<i4")),
    "uint32 TIFF": tiff(RAMP.astype("<u4")),
    "float TIFF": tiff(RAMP.astype("<f4")),
    "float TIFF, big-endian": tiff(RAMP.astype(">f4")),
    "compressed TIFF": encode(Image.fromarray(RAMP.astype(np.uint16)), "TIFF", compression="tiff_lzw"),
    "compressed float TIFF": encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF", compression="tiff_deflate"),
    "16-bit PGM": pgm(RAMP, 65535),
    "16-bit PGM in text": pgm(RAMP, 65535, "P2"),
    "16-bit PPM": pgm(colour(RAMP), 65535, "P6"),
    "JPEG 2000": encode(Image.fromarray(RAMP.astype(np.uint16)), "JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("name", DEEP)
def test_a_given_range_goes_from_black_to_white(name: str) -> None:
    pixels, notices = decoded(DEEP[name])
    assert np.abs(pixels - colour(BLACK_TO_WHITE)).max() < 1.01
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert notices == []


@pytest.mark.parametrize("name", DEEP)
def test_without_a_range_nothing_is_dark_without_a_word(name: str) -> None:
    """Of a type with a range it uses less than a sixteenth; of another it is stretched. Both are said."""
    pixels, notices = decoded(DEEP[name], Decoding())
    no_range = "float" in name or "32" in name or "signed" in name
    assert pixels.max() == (255 if no_range else 15)
    (notice,) = notices
    assert notice.kind == ("no range" if no_range else "narrow")
    assert "0 to 4,095" in notice.text
    assert "--data.range LOW HIGH" in notice.text


@pytest.mark.parametrize(
    "data",
    [
        tiff(RAMP.astype("<u2"), t281=(3, 4095)),
        tiff(RAMP.astype("<u2"), t340=(3, 0), t341=(3, 4095)),
        pgm(RAMP, 4095),
        pgm(RAMP, 4095, "P2"),
        pgm(colour(RAMP), 4095, "P6"),
        png(RAMP * 16 + RAMP // 256, 16, GREY),
        tiff((RAMP / 4095).astype("<f4")),  # 0 to 1
    ],
)
def test_a_declared_range_goes_from_black_to_white(data: bytes) -> None:
    pixels, notices = decoded(data, Decoding())
    assert np.abs(pixels - colour(BLACK_TO_WHITE)).max() < 1.01
    assert [notice.kind for notice in notices] in ([], ["no range"])


def test_a_range_that_is_declared_wrongly_is_not_taken() -> None:
    pixels, notices = decoded(tiff((RAMP * 16).astype("<u2"), t281=(3, 4095)), Decoding())
    assert (pixels.max(), notices) == (255, [])


def test_twelve_packed_bits_have_twelve_bits() -> None:
    bits = (RAMP[..., None] >> np.arange(11, -1, -1)) & 1
    data = tiff(np.packbits(bits.reshape(8, -1), axis=1), t256=(4, 8), t258=(3, 12))
    pixels, notices = decoded(data, Decoding())
    assert np.abs(pixels - colour(BLACK_TO_WHITE)).max() < 1.01
    assert notices == []


def test_what_is_no_number_is_black_and_what_is_endless_is_white() -> None:
    values = RAMP.astype("<f4")
    values[0, :3] = np.nan, np.inf, -np.inf
    pixels, _ = decoded(tiff(values), Decoding())
    assert pixels[0, :3, 0].tolist() == [0, 255, 0]
    assert pixels[-1, -1, 0] == 255
    assert decoded(tiff(np.full((8, 8), np.nan, "<f4")), Decoding())[0].max() == 0


def test_a_range_that_misses_the_values_is_said() -> None:
    for span in ((60_000, 61_000), (0, 4_000_000)):
        _, (notice,) = decoded(DEEP["16-bit PNG"], Decoding(range=span))
        assert notice.kind == "narrow"
        assert "of --data.range" in notice.text


def test_images_of_8_bits_and_of_one_grey_are_not_touched_and_not_mentioned() -> None:
    eight = np.arange(64).reshape(8, 8)
    for data in (png(eight, 8, GREY), encode(Image.fromarray(eight.astype(np.uint8)), "TIFF"), pgm(eight, 300)[:0]):
        if data:
            pixels, notices = decoded(data, Decoding(range=(0, 10)))
            assert np.array_equal(pixels, colour(eight))
            assert notices == []
    assert decoded(png(np.full((8, 8), 700), 16, GREY), Decoding())[1] == []


def drawing() -> np.ndarray:
    """[8, 8, 4] A nearly black stroke on nothing, whose pixels say black too."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 3:5] = 9, 9, 9, 255
    return pixels


def transparent_images() -> dict[str, bytes]:
    stroke = drawing()
    image, grey = Image.fromarray(stroke), stroke[..., 0].astype(int)
    palette = Image.fromarray((stroke[..., 3] // 255).astype(np.uint8), "L").convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    return {
        "RGBA": encode(image, "PNG"),
        "LA": encode(image.convert("LA"), "PNG"),
        "palette, one colour": encode(palette, "PNG", transparency=0),
        "palette, alphas": encode(palette, "PNG", transparency=b"\0\xff"),
        "colour and a key": png(colour(grey), 8, COLOUR, (0, 0, 0)),
        "grey and a key": png(grey, 8, GREY, (0,)),
        "4-bit grey and a key": png(np.where(grey, 0, 7), 4, GREY, (7,)),
        "2-bit grey and a key": png(np.where(grey, 0, 1), 2, GREY, (1,)),
        "1-bit grey and a key": png(np.where(grey, 0, 1), 1, GREY, (1,)),
        "16 bits and alpha": png(stroke.astype(int) * 257, 16, COLOUR_ALPHA),
        "16-bit grey and alpha": png(stroke[..., 2:].astype(int) * 257, 16, GREY_ALPHA),
        "16 bits and a key": png(colour(grey) * 257, 16, COLOUR, (0, 0, 0)),
        "16-bit grey and a key": png(grey * 257, 16, GREY, (0,)),
        "WebP": encode(image, "WEBP", lossless=True),
        "GIF": encode(palette, "GIF", transparency=0),
        "TIFF": encode(image, "TIFF"),
        "TIFF, multiplied by alpha": tiff(stroke[..., 2:].copy(), t338=(3, 1), t262=(3, 1)),
    }


@pytest.mark.parametrize("name", transparent_images())
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_what_is_transparent_shows_the_background(name: str, background: tuple[int, int, int]) -> None:
    if name in ("1-bit grey and a key", "TIFF, multiplied by alpha") and PILLOW < 13:
        pytest.skip("Pillow reads it since version 13")
    pixels, _ = decoded(transparent_images()[name], Decoding(background))
    shown = drawing()[..., 3] > 0
    assert np.array_equal(pixels[~shown], np.broadcast_to(background, (56, 3)))
    assert pixels[shown].max() <= 9


def test_half_transparent_is_half_background_and_opaque_is_as_it_was() -> None:
    image = picture()
    opaque, half = image.copy(), image.copy()
    opaque.putalpha(255)
    half.putalpha(128)
    assert np.array_equal(decoded(encode(opaque, "PNG"))[0], np.asarray(image))
    expected = (np.asarray(image) * 128.0 + 255 * 127) / 255
    assert np.abs(decoded(encode(half, "PNG"))[0] - expected).max() < 1


PIXELS = Recipe((ViewRecipe(center_crop=1.0),), 32)


@both_loaders
def test_both_loaders_follow_and_say_it_once(kind: str, tmp_path: Path) -> None:
    large = np.kron(RAMP, np.ones((4, 4), int))
    for number in range(3):
        (tmp_path / f"{number} deep.png").write_bytes(png(large, 16, GREY))
    (tmp_path / "3 float.tif").write_bytes(tiff(large.astype("<f4")))
    (tmp_path / "4 stroke.png").write_bytes(png(np.zeros((32, 32, 4)), 8, COLOUR_ALPHA))
    encoded = Image.fromarray(np.full((32, 32), 100, np.uint8))
    encoded.save(tmp_path / "5 plain.jpg")
    for decoding in (Decoding(), Decoding((0, 0, 255), (0, 4095))):
        source = open_source(tmp_path)
        source.decoding = decoding
        with training(kind, source, PIXELS, 6) as loader:
            for _ in range(2):
                batch = next(loader)
                pixels = levels(batch.views[0], PIXELS)[batch.indices.argsort()]
            assert not loader.bad_images
        lines = source.notices.lines(source.names)
        whole = colour(np.kron(BLACK_TO_WHITE, np.ones((4, 4)))).transpose(2, 0, 1)
        assert np.abs(pixels[3].numpy() - whole).max() < 2
        assert pixels[5].numpy() == pytest.approx(100, abs=1.01)
        assert pixels[4].numpy() == pytest.approx(
            np.array(decoding.background)[:, None, None] * np.ones((3, 32, 32)), abs=0.01
        )
        assert pixels[0].max() == pytest.approx(15 if decoding.range is None else 255, abs=0.1)
        assert set(lines) == (set() if decoding.range else {"narrow", "no range"})
        if decoding.range is None:
            assert " deep.png and 2 others: values 0 to 4,095, less than a sixteenth" in lines["narrow"]
            assert lines["no range"].startswith("3 float.tif: values")
            with training(kind, source, PIXELS, 6) as loader:
                next(loader)
            assert source.notices.lines(source.names) == {}


def test_notices_of_several_processes_are_one() -> None:
    mine, other = Notices(), Notices()
    for number in (4, 2, 2):
        mine.add(number, Notice("a", f"about {number}"))
    other.add(7, Notice("a", "about 7"))
    other.add(8, Notice("b", "about 8"))
    mine.join(other.take())
    assert other.lines("") == {}
    names = [f"{number}.png" for number in range(9)]
    assert mine.lines(names) == {"a": "4.png and 2 others: about 4", "b": "8.png: about 8"}
    mine.add(3, Notice("a", "again"))
    assert mine.lines(names) == {}


# EXIF

EXIF = b"Exif\0\0"
XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'


def turned(image: Image.Image, orientation: int) -> np.ndarray:
    """What has this orientation in its EXIF, upright."""
    return np.asarray(image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_270))


def pictures_with_exif() -> dict[str, tuple[bytes, int]]:
    """File name → bytes, and the orientation."""
    jpeg = encode(picture(), "JPEG")
    cmyk = encode(picture().convert("CMYK"), "JPEG")
    found = {}
    for name, (exif, orientation) in odd_exif().items():
        found[f"{name}.jpg"] = with_exif(jpeg, EXIF + exif), orientation
        found[f"{name} in inks.jpg"] = with_exif(cmyk, EXIF + exif), orientation
        found[f"{name}.png"] = encode(picture(), "PNG", exif=exif), orientation
        found[f"{name}.webp"] = encode(picture(), "WEBP", lossless=True, exif=EXIF + exif), orientation
    good = exif_of((0x0112, 3, 1, 6))
    marker = jpeg.index(b"\xff\xdb")
    found["behind others.jpg"] = jpeg[:marker] + with_exif(b"\xff\xd8", EXIF + good)[2:] + jpeg[marker:], 6
    found["behind its XMP.jpg"] = with_exif(jpeg, XMP.replace(b"6", b"1"), EXIF + good), 6
    found["in XMP.jpg"] = with_exif(jpeg, XMP), 6
    found["1, in XMP 6.jpg"] = with_exif(jpeg, EXIF + exif_of((0x0112, 3, 1, 1)), XMP), 1
    found["useless, in XMP 6.jpg"] = with_exif(jpeg, EXIF + b"nothing", XMP), 6
    found["two.jpg"] = with_exif(jpeg, EXIF + b"nothing", EXIF + good), 6
    found["MPF.jpg"] = (
        with_exif(jpeg, EXIF + good).replace(b"\xff\xdb", b"\xff\xe2\0\x0eMPF\0MM\0*\0\0\0\1\xff\xdb", 1),
        6,
    )
    found["in a profile.png"] = raw_profile(good), 6
    rgb = np.asarray(picture())
    found["long.tif"] = tiff(rgb, t258=(3, 8), t274=(4, 6)), 6
    return found


def raw_profile(exif: bytes) -> bytes:
    """As ImageMagick writes it."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n")
    return encode(picture(), "PNG", pnginfo=text)


@both_loaders
@pytest.mark.parametrize("in_bad_company", [False, True])
def test_no_exif_makes_a_picture_bad_and_both_loaders_turn_it_alike(
    kind: str, in_bad_company: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an image for which DALI raises, too: then the batch goes through Pillow."""
    from reco_fast.pipelines import base

    found = pictures_with_exif()
    for name, (data, _) in found.items():
        (tmp_path / name).write_bytes(data)
    deceiving = deceiving_images()["huffman.jpg"]
    if in_bad_company:
        (tmp_path / "huffman.jpg").write_bytes(deceiving)

        def trusting(data: bytes, *more: Any) -> tuple[bytes, int, int]:
            return (data, 300, 400) if data == deceiving else to_plain(data, *more)

        monkeypatch.setattr(base, "to_plain", trusting)
    source, recipe = open_source(tmp_path), Recipe((ViewRecipe(center_crop=1.0),), 40)
    with training(kind, source, recipe, len(source)) as loader:
        batch = next(loader)
        assert set(loader.bad_images) == ({"huffman.jpg"} if in_bad_company else set())
    pixels = levels(batch.views[0], recipe).permute(0, 2, 3, 1).numpy()
    of_jpeg, of_inks = (
        Image.open(io.BytesIO(encode(i, "JPEG"))).convert("RGB") for i in (picture(), picture().convert("CMYK"))
    )
    for place, image in zip(batch.indices.tolist(), pixels, strict=True):
        name = source.names[place]
        plain = of_inks if "inks" in name else of_jpeg if name.endswith(".jpg") else picture()
        upright = turned(plain, found[name][1])
        cut = [(side - 40) // 2 for side in upright.shape[:2]]
        expected = upright[cut[0] : cut[0] + 40, cut[1] : cut[1] + 40]
        assert np.abs(image - expected).max() < 1.01, name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_followed(kind: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(upright))
    assert to_plain(data)[1:] == (upright.height, upright.width)


def test_without_exif_a_file_is_handed_on_as_it_is_and_with_it_no_tag_is_left_but_one() -> None:
    jpeg = encode(picture(), "JPEG")
    assert plain_exif(jpeg) is jpeg
    assert to_plain(jpeg)[0] is jpeg
    for name, (exif, orientation) in odd_exif().items():
        plain = plain_exif(with_exif(jpeg, EXIF + exif))
        assert plain == with_exif(jpeg, EXIF + exif_of((0x0112, 3, 1, orientation))), name
        assert plain_exif(plain) is plain


def test_a_tiff_loses_tags_of_impossible_types() -> None:
    rgb = np.asarray(picture())
    for tags in ({"t34853": (9, -5)}, {"t700": (3, 5)}, {"t34665": (2, 0x61626300)}):
        data = tiff(rgb, t274=(3, 6), **tags)
        assert np.array_equal(decoded(data)[0], turned(picture(), 6))
    whole = tiff(rgb, t274=(3, 6))
    assert plain_exif(whole) is whole


def test_of_a_jpeg_nothing_but_exif_and_further_pictures_goes() -> None:
    """Wherever they stand among its segments; a file that holds no more than that is not copied."""
    jpeg = encode(picture(), "JPEG")
    assert jpeg[2:4] == b"\xff\xe0"
    first = 4 + int.from_bytes(jpeg[4:6])  # behind JFIF
    comment, further = b"\xff\xfe\x00\x07hello", b"\xff\xe2\x00\x08MPF\0xx"
    exif, useless = (with_exif(b"", b"Exif\0\0" + body) for body in (exif_of((0x0112, 3, 1, 6)), b"nothing"))
    found = plain_exif(jpeg[:first] + useless + comment + exif + further + jpeg[first:])
    (segment,) = re.findall(rb"\xff\xe1..Exif.{28}", found[:64], re.DOTALL)
    assert found == jpeg[:2] + segment + jpeg[2:first] + comment + jpeg[first:]
    assert decode_image(found).size == (40, 60)
    assert plain_exif(found) is found
