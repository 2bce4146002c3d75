"""Tables and pictures as HTML. Every text goes through `html.escape`: class words and paths may hold anything."""

import base64
from collections.abc import Sequence
from html import escape


def percent(share: float) -> str:
    """A share, 0..1, for people; the space does not break."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def picture(png: bytes, alt: str, caption: str = "", css: str = "") -> str:
    """A PNG file as a figure."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{css}"><img src="{inline(png)}" alt="{escape(alt)}">{below}</figure>\n'


def inline(png: bytes) -> str:
    """A PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def table(
    rows: Sequence[Sequence[str]],
    head: Sequence[str] = (),
    *,
    numbers: int = 0,
    caption: str = "",
    css: str = "",
) -> str:
    """Rows of texts, the first of each its name; the `numbers` columns behind it are set to the right."""

    def cells(texts: Sequence[str], every: str) -> str:
        first, *others = [escape(text) for text in texts]
        number = f'<{every} class="number">'
        ends = [
            f"{number if place < numbers else f'<{every}>'}{text}</{every}>"
            for place, text in enumerate(others)
        ]
        return f"<th>{first}</th>{''.join(ends)}"

    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    top += f"<thead><tr>{cells(head, 'th')}</tr></thead>" if head else ""
    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<table class="{css}">{top}<tbody>{body}</tbody></table>\n'
