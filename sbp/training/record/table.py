"""Tables as text."""


def markdown(lines: list[list[str]]) -> str:
    """A Markdown table whose columns line up as plain text too; the first line holds the headings."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
