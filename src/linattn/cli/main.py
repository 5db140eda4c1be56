"""The `linattn` command: one verb, one function. `linattn VERB --help` says what a verb takes.

Exit codes: 0 done, 1 the work failed (NaN loss, a full disk, an interrupt), 2 the request was wrong.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

import linattn

VERBS = {
    "prepare": ("linattn.cli.prepare", "text files to token shards"),
    "train": ("linattn.cli.train", "train a model from a recipe or a run.yaml, or resume it"),
    "eval": ("linattn.cli.evaluate", "bits per byte of held-out text, recall, and lm-eval's tasks"),
    "generate": ("linattn.cli.generate", "continue a prompt, also from a saved state"),
    "read": ("linattn.cli.read", "read a text of any length into a state on disk"),
    "convert": (
        "linattn.cli.convert",
        "a published checkpoint, of a folder or the hub, to one that every verb reads",
    ),
    "export": ("linattn.cli.export", "a trained model for Hugging Face transformers"),
    "info": ("linattn.cli.info", "sizes of a model: parameters, state bytes, FLOPs"),
    "doctor": ("linattn.cli.doctor", "which backend each op takes on this machine, and why"),
    "bench": ("linattn.cli.bench", "speed as a record: the laws first, then times beside floors and peers"),
    "demo": (
        "linattn.cli.demo",
        "the whole path on a CPU in minutes: prepare, train, evaluate, generate, read a novel",
    ),
}


def usage() -> str:
    """The page that `linattn --help` prints."""
    lines = [f"linattn {linattn.__version__}: language models whose memory is one state of constant size", ""]
    lines += ["usage: linattn VERB [options]     linattn VERB --help for a verb's options", ""]
    lines += [f"  {verb:10s} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(linattn.__version__)
        return 0
    verb = args[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(VERBS)}"
        return _fail(f"unknown verb {verb!r}{hint}", 2)
    try:
        return importlib.import_module(VERBS[verb][0]).run(args[1:]) or 0
    except ValueError as error:
        return _fail(str(error), 2)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return _fail(f"{error.filename}: {error.strerror}", 2)
    except OSError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except Exception as error:
        from linattn.train import TrainingStopped

        if isinstance(error, TrainingStopped):
            return _fail(str(error), error.exit_code)
        raise


def _fail(message: str, code: int) -> int:
    print(f"linattn: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
