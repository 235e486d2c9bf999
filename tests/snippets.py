"""
Runs the snippets of a Markdown page as they are printed, in order: `python snippets.py PAGE`, in the folder they are meant for.

    ```bash                      is run by bash, which stops at the first command that fails
    ```python                    goes on with the variables of the ones before it
    ```python title="serve.py"   becomes that file
    ```text                      after a snippet is what it must print

Other languages are passed over.
"""

import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Snippet:
    """One block of code; `line` is where it starts in its page, `output` what it must print, if the page says so."""

    language: str
    file: str | None
    code: str
    line: int
    output: str | None = None


def read_snippets(page: Path) -> list[Snippet]:
    found = []
    text, end = page.read_text(encoding="utf-8"), 0
    for block in re.finditer(r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', text, flags=re.DOTALL | re.MULTILINE):
        language, file, code = block.groups()
        between, end = text[end : block.start()], block.end()
        if language == "text" and not between.strip():
            found[-1].output = code
        elif language in ("bash", "python"):
            found.append(Snippet(language, file, code, text[: block.start()].count("\n") + 2))
    return found


def run_page(page: Path) -> None:
    """
    Raises:
        SystemExit: if a snippet fails or prints something else than its page says; says which.
    """
    variables = {"__name__": "__main__"}
    for snippet in read_snippets(page):
        place = f"{page.name}, line {snippet.line}"
        printed = io.StringIO()
        if snippet.file is not None:
            Path(snippet.file).write_text(snippet.code)
        elif snippet.language == "python":
            with redirect_stdout(printed):
                exec(compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec"), variables)
        else:
            result = subprocess.run(["bash", "-ec", snippet.code], stdout=subprocess.PIPE, text=True)
            printed.write(result.stdout)
            if result.returncode:
                sys.exit(f"{place}: ended with {result.returncode}\n{result.stdout}")
        if snippet.output is not None and printed.getvalue().strip() != snippet.output.strip():
            sys.exit(f"{place}: printed\n{printed.getvalue()}\nbut the page says\n{snippet.output}")


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
