"""Writes index.html into the folder of a training run, an evaluation or an attack.

    python -m report.page runs/0001-star        writes the page again

The page contains its images, so it needs no server and no network. It is made only from the files
in the folder: during a run, after a kill, or long after. The page names files that are missing or
damaged. What it shows: run_page.py, evaluation_page.py and attack_page.py, as blocks (blocks.py);
how: page.html.j2 and page.css.
"""

import support.openmp

import datetime
import functools
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from report.attack_page import attack_page
from report.evaluation_page import evaluation_page
from report.previews import finished_previews, sheet_file
from report.run_page import FIGURES, run_page
from support.cli import Parser, run_command
from support.errors import UserError, warning
from support.files import write_text
from toy import worlds

PAGES = {"run.json": run_page, "eval.json": evaluation_page, "attack.json": attack_page}


def make(folder):
    """Writes folder/index.html, completely or not at all.

    UserError without jinja2, or if the folder has no run, evaluation or attack.
    """
    folder = Path(folder)
    try:
        import jinja2
    except ImportError:
        raise UserError(
            "A page needs jinja2, which is not installed: pip install jinja2."
        ) from None
    page_of = next((PAGES[name] for name in PAGES if (folder / name).is_file()), None)
    if page_of is None:
        raise UserError(
            f"{folder} has neither a run of train.py (run.json) nor an evaluation of eval.py "
            "(eval.json) nor an attack of attack.py (attack.json): give the --out folder of one of "
            "them."
        )
    try:
        page = page_of(folder)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"The files in {folder} cannot be read ({e!r}).") from e
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    no_blank_lines = dict(trim_blocks=True, lstrip_blocks=True)
    environment = jinja2.Environment(loader=loader, autoescape=True, **no_blank_lines)
    page |= {
        "credit": worlds.of(page["model"]).CREDIT,
        "made": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }
    html = environment.get_template("page.html.j2").render(page)
    write_text(folder / "index.html", html + "\n")


warn = functools.cache(warning)  # once per process


def page(folder):
    """Writes the page. Every error becomes a warning: a page must not end hours of training."""
    try:
        make(folder)
    except Exception as e:
        warn(f"no page was written: {e if isinstance(e, UserError) else repr(e)}")


# ---------------------------------------------------------------------------------- during a run
def require_tensorboard():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--report-to tensorboard needs TensorBoard: pip install tensorboard, or remove the "
            "flag."
        ) from None
    return SummaryWriter


class Reporter:
    """Updates the page of a run. With to="tensorboard" also writes events into tensorboard/.

    start: iterations that are done. An earlier process may have written events after them;
    TensorBoard hides those, because these iterations are computed again.
    """

    def __init__(self, folder, to=None, start=0):
        self.folder, self.writer = folder, None
        if to:
            self.writer = require_tensorboard()(folder / "tensorboard", purge_step=start)
        self.reported = {done for done in finished_previews(folder) if done < start}

    def log_row(self, row):
        """After each row of log.csv, {column: value}. The rows of previews have gap and drift."""
        self.write_events(row)
        if "gap_student" in row:
            page(self.folder)

    def log_previews(self):
        """After the first preview, and at the end of the run."""
        self.write_events({})
        page(self.folder)

    def write_events(self, row):
        """Events of a row and of new previews. An error ends TensorBoard's events, not the run."""
        if self.writer is None:
            return
        try:
            for key in FIGURES:
                if key in row:
                    self.writer.add_scalar(key.replace("_", "/"), row[key], row["iteration"])
            for done in finished_previews(self.folder):
                if done not in self.reported:
                    self.reported.add(done)
                    sheet = np.asarray(Image.open(sheet_file(self.folder, done)).convert("RGB"))
                    self.writer.add_image("previews", sheet, done, dataformats="HWC")
            self.writer.flush()
        except Exception as e:
            warn(f"TensorBoard's events end here: {e!r}")
            self.writer = None


# ---------------------------------------------------------------------------------- the command
def parse(argv=None):
    parser = Parser(prog="python -m report.page", description=__doc__)
    about = "the --out folder of train.py, eval.py or attack.py"
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=about)
    return parser.parse_args(argv)


def main(args):
    make(args.folder)
    print(f"open this page in a browser: {args.folder / 'index.html'}")


if __name__ == "__main__":
    sys.exit(run_command(main, parse()))
