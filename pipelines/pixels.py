"""From the values of an image file to 8-bit RGB: deep ones are scaled, and what is transparent gets a background.

The functions need NumPy and Pillow alone: the card of an exported backbone shows them, so that its code does the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class Decoding(NamedTuple):
    """What a user may choose: the RGB behind transparent images, and which values of images of more than 8 bits a
    channel become black and white (None: of the range that the file declares or its type has, else the image's own)."""

    background: tuple[int, int, int] = (255, 255, 255)
    range: tuple[float, float] | None = None


UNSAID = Decoding()


class Notice(NamedTuple):
    """What is to be said of an image that is used all the same."""

    kind: str
    text: str


class Notices:
    """Those of a source, gathered by its loaders until they are said, each kind once. Threads may add at once."""

    def __init__(self) -> None:
        self._met: dict[str, tuple[int, str, set[int]]] = {}  # kind → first place, what to say of it, all places
        self.said: set[str] = set()  # kinds

    def add(self, place: int, notice: Notice) -> None:
        if notice.kind not in self.said:
            self._met.setdefault(notice.kind, (place, notice.text, set()))[2].add(place)

    def take(self) -> "Notices":
        """What has been gathered, which is forgotten here: for another process's `join`."""
        taken = Notices()
        taken._met, self._met = self._met, taken._met
        return taken

    def join(self, others: "Notices") -> None:
        for kind, (place, text, places) in others._met.items():
            if kind not in self.said:
                self._met.setdefault(kind, (place, text, set()))[2].update(places)

    def lines(self, names: Sequence[str]) -> dict[str, str]:
        """By kind a line for the user, which names one image; none of a kind that has been said."""
        found = list(self.take()._met.items())
        self.said.update(kind for kind, _ in found)
        count = {kind: f" and {len(places) - 1:,} others" if len(places) > 1 else "" for kind, (_, _, places) in found}
        return {kind: f"{names[place]}{count[kind]}: {text}" for kind, (place, text, _) in found}


def deep_values(image: Any, file: Any) -> tuple[Any, tuple[float, float] | None] | None:
    """Of an image of more than 8 bits a channel, opened from `file` and not loaded: values, [H, W] or [H, W, 3 or 4]
    with alpha last, and the range of their type, if it has one. None of any other."""
    codec, given = (image.tile[0][0], image.tile[0][3]) if image.tile else ("", "")
    layout = given if isinstance(given, str) else str(given[0]) if given else ""  # of the samples in the file
    limit = int(given[1]) if codec.startswith("ppm") else 65535
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if codec.startswith("ppm"):  # Pillow has stretched them to 16 bits
            return np.rint(values * (limit / 65535)), (0, limit)
        if layout == "I;12":
            return values, (0, 4095)
        if layout == "I;32N":
            return values.view(np.uint32), None
        return values, (0, 65535) if image.mode[1:] or layout == "I;16B" else None
    if ";16" in layout:
        order = layout[-1]
    elif codec == "ppm" and image.mode == "RGB" and limit > 255:
        order = "B"
    elif layout in ("R", "G", "B") and tags.get(258, (8,))[0] == 16:  # a plane for each colour, misread by Pillow
        order = "L" if tags.prefix == b"II" else "B"
    else:
        return None
    if layout.split(";")[0] not in ("RGB", "RGBX", "RGBA", "LA", "R"):  # inks, or multiplied by alpha
        return None
    upper, lower = eight_of_sixteen(image, order), eight_of_sixteen(Image.open(file), {"B": "L"}.get(order, "B"))
    if layout == "LA;16B":
        lower = lower[..., [1, 1, 1, 3]]
    return upper.astype(np.uint16) << 8 | lower, (0, limit)


def eight_of_sixteen(image: Any, order: str) -> Any:
    """[H, W, 3 or 4] uint8: of the 16 bits of each value those that Pillow keeps, which are the upper ones if `order`
    is the byte order of the file, else the lower ones. `image` is not loaded yet."""
    tiles = []
    for codec, extents, offset, given in image.tile:
        layout, *rest = [given] if isinstance(given, str) else given
        layout = f"{layout.split(';')[0]};16{order}"
        layout = "RGBA" if layout == "LA;16L" else layout  # which Pillow lacks: grey, grey, alpha, alpha
        if codec == "ppm":
            codec, rest = "raw", [0, 1]
        tiles.append(type(image.tile[0])(codec, extents, offset, (layout, *rest) if rest else layout))
    image.tile = tiles
    return np.asarray(image)


def scaling(
    values: Any, span: tuple[float, float] | None, of_type: tuple[float, float] | None, tags: Any
) -> tuple[float, float, float, float, bool]:
    """Of deep values: which becomes black and which white, their own lowest and highest, and whether the two first are
    known: by `span`, by `tags` that hold, or by the type; else they are 0 and 1 where that fits, or the two others."""
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    darkest, brightest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if span is not None:
        return *span, darkest, brightest, True
    declared = [np.ravel(tags.get(new, tags.get(old, 0))).tolist() for new, old in ((340, 280), (341, 281))]
    if all(stated and isinstance(stated[0], int | float) for stated in declared):
        low, high = (float(stated[0]) for stated in declared)
        if low <= darkest and low < high and brightest <= high:
            return low, high, darkest, brightest, True
    if of_type is not None:
        return *of_type, darkest, brightest, True
    fits = darkest >= 0 and brightest <= 1 and (darkest == brightest or brightest - darkest >= 1 / 16)
    return *((0.0, 1.0) if fits else (darkest, brightest)), darkest, brightest, False


def eight_bits(image: Any, file: Any, span: tuple[float, float] | None) -> tuple[Image.Image, Any]:
    """`image`, opened from `file` and not loaded, with 8 bits a channel, and what `scaling` says if it had more."""
    deep, key = deep_values(image, file), image.info.get("transparency")
    if deep is None:
        if (
            image.mode == "L" and image.tile and isinstance(key, int)
        ):  # of 2 or 4 bits, which Pillow stretches without the key
            image.info["transparency"] = key * {"L;2": 85, "L;4": 17}.get(str(image.tile[0][3]), 1)
        return image, None
    values, tags = deep[0], getattr(image, "tag_v2", {})
    colours = values[..., :3] if values.ndim == 3 else values
    low, high, *_ = scaled = scaling(colours, span, deep[1], tags)
    black, white = (high, low) if tags.get(262) == 0 else (low, high)

    def levels(x: Any) -> Any:
        with np.errstate(invalid="ignore"):
            x = (x.astype(np.float64) - black) * (255.99609375 / ((white - black) or 1))  # of 16 bits the upper 8
        return np.nan_to_num(np.clip(x, 0, 255)).astype(np.uint8)

    pixels = levels(np.arange(65536))[colours] if colours.dtype == np.uint16 else levels(colours)
    result = Image.fromarray(pixels).convert("RGB")
    if values.shape[2:] == (4,):
        result.putalpha(Image.fromarray((values[..., 3] >> 8).astype(np.uint8)))
    elif key is not None:
        apart = (values != key).reshape(*values.shape[:2], -1).any(axis=-1)
        result.putalpha(Image.fromarray(np.where(apart, 255, 0).astype(np.uint8)))
    return result, scaled


def over(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """`image`, of 8 bits a channel, as RGB, with `background` where it is transparent."""
    if image.mode == "La":  # multiplied by alpha, which Pillow converts to LA alone
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    page = Image.new("RGB", image.size, background)
    image = image.convert("RGBA")
    page.paste(image, mask=image)
    return page


def notice_of(mode: str, scaled: tuple[float, float, float, float, bool], decoding: Decoding) -> Notice | None:
    """What there is to say of how `eight_bits` has `scaled` an image of Pillow's `mode`; None where all went well."""
    low, high, darkest, brightest, known = scaled
    values, advice = f"{darkest:,g} to {brightest:,g}", "--data.range LOW HIGH says which become black and white"
    if not known:
        kind = "floating-point numbers" if mode == "F" else "signed or 32-bit numbers"
        return Notice(
            "no range", f"values {values}, {kind} without a range, scaled from {low:,g} to {high:,g}; {advice}"
        )
    if darkest < brightest and min(brightest, high) - max(darkest, low) < (high - low) / 16:
        whose = "--data.range" if decoding.range else "their range"
        return Notice("narrow", f"values {values}, less than a sixteenth of {whose} {low:,g} to {high:,g}; {advice}")
    return None
