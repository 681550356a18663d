"""A chart that many tests have drawn alike is drawn once: to draw it takes longer than all the rest of a page.

What a chart says of itself decides every byte of its picture (tests/charts).
"""


def once(draw):
    """`draw`, which remembers what it drew."""
    drawn = {}

    def draw_once(chart, **options):
        key = repr((chart, options))
        if key not in drawn:
            drawn[key] = draw(chart, **options)
        return drawn[key]

    return draw_once
