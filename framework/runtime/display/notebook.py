"""A live display in a notebook of Jupyter.

IPython is not required: it is there when a notebook runs this code. rich has a live display for
notebooks too, but needs ipywidgets for it, whose output is lost when the notebook is saved.
"""

import sys
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = 100
ROWS = 32
FORMAT = (
    '<pre style="margin:0;padding:0 0.5em;white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace\">{code}</pre>"
)


def in_notebook() -> bool:
    """Return whether this code runs in the kernel of a notebook: Jupyter, VS Code, Colab."""
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return False
    return getattr(ipython.get_ipython(), "kernel", None) is not None


class NotebookDisplay:
    """An output below the cell that runs, which each update replaces.

    It has the methods of `rich.live.Live` that do the same in a terminal.

    Attributes:
        console: renders the output.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(
            file=StringIO(),
            record=True,
            width=COLUMNS,
            height=ROWS,
            force_terminal=True,
            force_jupyter=False,  # it would print each update below the last one
            color_system="truecolor",
        )
        self._output: Any = None

    def update(self, content: "RenderableType", *, refresh: bool = True) -> None:
        """Show something instead of what was shown before."""
        import IPython.display

        display: Any = IPython.display.display
        self.console.print(content)
        text = self.console.export_text(clear=False)
        html = self.console.export_html(inline_styles=True, code_format=FORMAT)
        self.console.file = StringIO()
        bundle = {"text/plain": text, "text/html": html}
        if self._output is None:
            self._output = display(bundle, raw=True, display_id=True)
        else:
            self._output.update(bundle, raw=True)

    def stop(self) -> None:
        """Keep what is shown."""
