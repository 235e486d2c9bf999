"""The docstrings of the package, written as in transformers, as Markdown: sections become lists, names of objects links."""

import re

import griffe

TITLES = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises"}
SECTION = re.compile(rf"^({'|'.join(TITLES)}):\n((?:    .*\n|\n)+)", flags=re.MULTILINE)
ENTRY = re.compile(r"^([\w, *]+?)(?= \(|:)", flags=re.MULTILINE)


class TransformersDocstrings(griffe.Extension):
    """Rewrites every docstring of the package once all of it has been read."""

    def on_package(self, *, pkg, loader, **kwargs):
        objects = list(walk(pkg))
        paths = {path_in(part): part.path for part in objects}
        for part in objects:
            if part.docstring is not None:
                part.docstring.value = as_markdown(part.docstring.value, paths)


def walk(part):
    """All objects of a package, without those that it only imports."""
    yield part
    for member in part.members.values():
        if not member.is_alias:
            yield from walk(member)


def path_in(part) -> str:
    """Name of an object as docstrings write it: without its module."""
    return part.path.removeprefix(f"{part.module.path}.")


def as_markdown(text: str, paths: dict[str, str]) -> str:
    def section(match):
        title, entries = match.groups()
        entries = re.sub(r"^    ", "", entries, flags=re.MULTILINE).strip()
        entries = re.sub(r"\n +", " ", entries)  # an entry's further lines
        if title != "Returns":
            entries = re.sub(r"^", "- ", ENTRY.sub(r"**\1**", entries), flags=re.MULTILINE)
        return f"**{TITLES[title]}**\n\n{entries}\n\n"

    def link(match):
        name = match[1]
        return (
            f'<autoref optional identifier="{paths[name]}"><code>{name}</code></autoref>'
            if name in paths
            else f"`{name}`"
        )

    text = SECTION.sub(section, f"{text}\n")
    return re.sub(r"\[`([\w.]+)`\]", link, text)
