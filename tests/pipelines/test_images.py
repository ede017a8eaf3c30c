"""The check of a single file's bytes: odd ones pass with their true size, bad ones are refused with a reason."""

import contextlib
import io
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_sets import and_shared
from odd_images import bad_images, deceiving_images, encode, odd_images, picture
from PIL import Image, ImageOps

from reco_fast.pipelines.images import BadImage, decode_image, jpeg_size, to_plain

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", r"ignore::UserWarning:PIL\.")


@pytest.mark.parametrize("name", odd_images())
def test_odd_images_pass_with_their_upright_size(name: str) -> None:
    data = odd_images()[name]
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    plain, height, width = to_plain(data)
    assert (height, width) == (upright.height, upright.width)
    assert plain == data if jpeg_size(data) is not None else plain.startswith(b"P6\n")
    assert np.array_equal(np.asarray(decode_image(plain)), np.asarray(decode_image(data)))


def test_only_jpegs_that_every_decoder_reads_alike_are_ordinary() -> None:
    ordinary = {name for name, data in odd_images().items() if jpeg_size(data) is not None}
    assert ordinary == {
        *("plain.jpg", "PROGRESSIVE.JPEG", "grey.jpg", "rotated.jpg", "padded.jpg", "1x1.jpg", "thin.jpg")
    }


@pytest.mark.parametrize("name", deceiving_images())
def test_jpegs_with_unusable_tables_are_not_ordinary(name: str) -> None:
    assert jpeg_size(deceiving_images()[name]) is None
    with pytest.raises(BadImage):
        to_plain(deceiving_images()[name])


@pytest.mark.parametrize("name", bad_images())
def test_bad_images_are_refused_with_a_reason_in_one_line(name: str) -> None:
    with pytest.raises(BadImage) as caught:
        to_plain(bad_images()[name])
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.jpg", "the file is empty"),
        ("page.jpg", r"not an image: it starts with b'<!DOCTYPE ht'"),
        ("lying 30000.jpg", "30000 × 30000 pixels, more than the 150,000,000 allowed"),
        ("lying 12000.jpg", "12000 × 9000 pixels, which .* bytes cannot hold"),
        ("truncated.jpg", "truncated"),
    ],
)
def test_the_reason_says_what_is_wrong(name: str, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        to_plain(bad_images()[name])


def test_a_lying_header_takes_no_memory() -> None:
    tracemalloc.start()
    for name in ("lying 30000.jpg", "lying 12000.jpg"):
        with pytest.raises(BadImage):
            to_plain(bad_images()[name])
    assert tracemalloc.get_traced_memory()[1] < 10e6


def test_a_very_large_image_passes() -> None:
    """12,000 × 9,000 of one grey: the smallest file that such a frame can have, near the limit of plausibility."""
    data = encode(Image.new("L", (12_000, 9_000), 127), "JPEG", optimize=True)
    assert jpeg_size(data) == (9_000, 12_000)
    png = encode(Image.new("1", (12_000, 9_000)), "PNG")
    assert decode_image(png).size == (12_000, 9_000)


def test_16_bit_images_keep_their_upper_8_bits() -> None:
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp), "PNG")))
    assert np.array_equal(decoded, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("images", and_shared("photographs"))
def test_photographs_are_ordinary_and_checked_in_microseconds(images_of: Callable[[str], Path], images: str) -> None:
    files = [path.read_bytes() for path in sorted(images_of(images).iterdir())]
    assert [to_plain(data)[1:] for data in files] == [Image.open(io.BytesIO(d)).size[::-1] for d in files]
    assert sum(jpeg_size(data) is not None for data in files) >= 60
    start = time.perf_counter()
    for data in files:
        jpeg_size(data)
    assert (time.perf_counter() - start) / len(files) < 2e-3  # 10 to 20 µs; the rest is for a busy machine


def test_every_truncation_is_refused_or_decoded() -> None:
    data = encode(picture(), "JPEG", optimize=True)
    for length in range(0, len(data) - 1, 7):
        with pytest.raises(BadImage):
            to_plain(data[:length])


def test_fuzzed_headers_raise_nothing_else() -> None:
    chosen = random.Random(0)
    originals = list(odd_images().values())
    for _ in range(1500):
        data = bytearray(chosen.choice(originals))
        for _ in range(chosen.randint(1, 4)):
            data[chosen.randrange(min(len(data), 700))] = chosen.randrange(256)
        try:
            plain, height, width = to_plain(bytes(data))
        except BadImage:
            continue
        assert height * width > 0
        if plain.startswith(b"P6"):
            assert len(plain) == len(b"P6\n%d %d\n255\n" % (width, height)) + 3 * height * width


def test_a_jpeg_with_two_frames_or_a_false_length_is_left_to_pillow() -> None:
    data = encode(picture(), "JPEG")
    frame = data.index(b"\xff\xc0")
    (length,) = struct.unpack_from(">H", data, frame + 2)
    twice = data[:frame] + data[frame : frame + 2 + length] + data[frame:]
    for changed in (twice, data[: frame + 2] + b"\x00\x01" + data[frame + 4 :]):
        with contextlib.suppress(BadImage):
            assert jpeg_size(changed) is None
