"""What the tests of pictures measure: where texts are, and the contrast of two colours."""

from itertools import combinations
from xml.etree import ElementTree

from svg import CHARACTER_WIDTH, FONT_SIZE, SMALL

SVG = "{http://www.w3.org/2000/svg}"


def boxes(root: ElementTree.Element, namespace: str = SVG) -> list[tuple[str, float, float, float, float]]:
    """(text, left, top, right, bottom) of every text of a picture; the font is monospaced."""
    found = []
    for element in root.iter(f"{namespace}text"):
        size = SMALL if "small" in element.get("class", "") else FONT_SIZE
        width, y = size * CHARACTER_WIDTH * len(element.text or ""), float(element.get("y"))
        left = float(element.get("x")) - {"middle": width / 2, "end": width}.get(element.get("text-anchor"), 0)
        found.append((element.text, left, y - 0.75 * size, left + width, y + 0.2 * size))
    return found


def assert_texts_are_apart(root: ElementTree.Element, namespace: str = SVG) -> None:
    """Every text is inside the picture, and no two overlap."""
    width, height = map(float, root.get("viewBox").split()[2:])
    found = boxes(root, namespace)
    for name, left, top, right, bottom in found:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, name
    for one, other in combinations(found, 2):
        is_apart = one[3] <= other[1] or other[3] <= one[1] or one[4] <= other[2] or other[4] <= one[2]
        assert is_apart, f"{one[0]!r} and {other[0]!r}"


def contrast(one: str, other: str) -> float:
    """WCAG 2.1 contrast of two colours #rrggbb, from 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
