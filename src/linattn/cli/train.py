"""`linattn train RECIPE.py` or `linattn train --config run.yaml`: train, or go on with a run that was stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import tyro
import yaml

from linattn.core.config import from_data
from linattn.train import TrainConfig, train

USAGE = """usage: linattn train RECIPE.py [--steps N] [--model.d-model N] [...]
       linattn train --config run.yaml [...]

A recipe is a Python file that defines `config`, a TrainConfig (recipes/ has the published runs); run.yaml is what a run
writes beside its checkpoints. Every field can be changed after it; RECIPE.py --help lists them all.

  --resume auto|never|CHECKPOINT   auto goes on from the newest checkpoint of the run's folder, if there is one
  --print-config                   print the resolved configuration as yaml and leave
"""


def run(argv: list[str]) -> int:
    """Train; a run that ended early, its work saved, raises TrainingStopped."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    argv = list(argv)
    resume = _option(argv, "--resume", "auto")
    printed = "--print-config" in argv
    if printed:
        argv.remove("--print-config")
    source = _option(argv, "--config", "") or (argv.pop(0) if not argv[0].startswith("-") else "")
    if not source:
        raise ValueError("name a recipe (a Python file) or --config run.yaml; linattn train --help says more")
    # Which model, objective and schedule is the recipe's choice; their fields are plain options, not subcommands.
    config = tyro.cli(
        TrainConfig,
        args=argv,
        default=load_config(Path(source)),
        prog=f"linattn train {source}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    if printed:
        print(yaml.safe_dump(_plain(config), sort_keys=False), end="")
        return 0
    train(config, resume=resume)
    return 0


def load_config(path: Path) -> TrainConfig:
    """The configuration of a recipe (its ``config``) or of a yaml file.

    Raises:
        ValueError: no such file, no ``config`` in it, or fields that TrainConfig does not have.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; recipes are Python files such as recipes/debug_cpu.py")
    if path.suffix in (".yaml", ".yml"):
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML ({error})") from error
        return from_data(TrainConfig, data, where=str(path))
    if path.suffix != ".py":
        raise ValueError(f"{path}: a recipe is a .py file, a configuration a .yaml file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = getattr(module, "config", None)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path}: defines no `config` that is a TrainConfig")
    return config


def _option(argv: list[str], name: str, default: str) -> str:
    """Take ``name VALUE`` or ``name=VALUE`` out of argv."""
    for i, arg in enumerate(argv):
        if arg == name:
            if i + 1 == len(argv):
                raise ValueError(f"{name} needs a value")
            del argv[i]
            return argv.pop(i)
        if arg.startswith(name + "="):
            return argv.pop(i).partition("=")[2]
    return default


def _plain(config: TrainConfig) -> object:
    from linattn.core.config import to_data

    return to_data(config)
